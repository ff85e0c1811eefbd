"""The released layout of SAIL-VL2: its map, the converter both ways, loading it as it is, the full sizes."""

import json
import shutil
import sys

import pytest
import torch
from fake_release import DENSE, LANGUAGE_MODELS, VISION, random_weights, released_values, write_release
from PIL import Image
from released_forward import forward
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from sail_rl.cli import main
from sail_rl.command_line import BadInput
from sail_rl.convert import convert
from sail_rl.model import SailVL2ForConditionalGeneration
from sail_rl.model.load import load_checkpoint
from sail_rl.model.released import native_keys, released_key, to_native, to_released
from sail_rl.model.sizes import sail_vl2_config
from sail_rl.model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["What is in the picture? user assistant system"], vocab_size=320)


@pytest.fixture
def release(tmp_path, tokenizer):
    write_release(tmp_path / "release", tokenizer, DENSE)
    return tmp_path / "release"


def all_weights(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("llm", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_names_and_tensors_come_back(llm):
    weights = random_weights(released_values(llm, 320))
    for key, tensor in weights.items():
        names, parts = native_keys(key), to_native(key, tensor)
        assert [released_key(name) for name in names] == [key] * len(parts)
        assert torch.equal(to_released(key, parts), tensor)


@pytest.mark.parametrize("name", ["vision_model.head.weight", "mlp1.2.weight", "mlp10.weight", "lm_head.weight"])
def test_a_name_that_no_released_model_has(name):
    with pytest.raises(KeyError, match=name):
        native_keys(name)


@pytest.mark.parametrize("how", ["as it is", "converted"])
@pytest.mark.parametrize("llm", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_logits_are_those_of_the_released_code(tmp_path, tokenizer, llm, how):
    folder = tmp_path / "release"
    values, weights = write_release(folder, tokenizer, llm, files=2)
    if how == "converted":
        convert(folder, tmp_path / "native")
        folder = tmp_path / "native"
    model, processor = load_checkpoint(str(folder), "float32")
    picture = Image.effect_noise((112, 56), 90).convert("RGB")
    inputs = processor(images=[picture], text="user<IMG_CONTEXT>\nWhat is in the picture?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)  # two tiles and the thumbnail
    expected = forward(weights, values, inputs["input_ids"], inputs["pixel_values"], processor.image_token_id)
    with torch.no_grad():
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("llm", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_there_and_back_is_identical_to_the_byte(tmp_path, tokenizer, llm, files):
    values, _ = write_release(tmp_path / "release", tokenizer, llm, files)
    convert(tmp_path / "release", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "again")
    names = [file.name for file in sorted((tmp_path / "release").glob("*.safetensors"))]
    assert [file.name for file in sorted((tmp_path / "again").glob("*.safetensors"))] == names
    for name in (*names, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "release" / name).read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == values
    assert "SAILVLProcessor" in (tmp_path / "again" / "preprocessor_config.json").read_text()
    manifest = json.loads((tmp_path / "again" / "conversion.json").read_text())
    assert manifest["direction"] == "native -> released"
    assert manifest["tied_lm_head"] == llm["tie_word_embeddings"]


@pytest.mark.parametrize("llm", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_a_saved_model_goes_back_from_many_shards(tmp_path, tokenizer, llm):
    values, weights = write_release(tmp_path / "release", tokenizer, llm)
    model, processor = load_checkpoint(str(tmp_path / "release"), "float32")
    model.save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    processor.save_pretrained(tmp_path / "trained")
    assert len(list((tmp_path / "trained").glob("*.safetensors"))) > 10
    convert(tmp_path / "trained", tmp_path / "again")
    assert_same(all_weights(tmp_path / "again"), weights)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in ("model_type", "architectures", "force_image_size", "max_dynamic_patch", "select_layer", "torch_dtype"):
        assert config[key] == values[key]
    assert all(config["vision_config"][key] == value for key, value in VISION.items() if key != "model_type")
    assert all(config["llm_config"][key] == llm[key] for key in llm if key != "torch_dtype")


@pytest.mark.parametrize("llm", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_converted_files_are_what_the_model_saves(tmp_path, tokenizer, llm):
    write_release(tmp_path / "release", tokenizer, llm)
    convert(tmp_path / "release", tmp_path / "native")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "release", dtype=torch.float32)
    assert type(model) is SailVL2ForConditionalGeneration
    model.save_pretrained(tmp_path / "saved")
    assert_same(all_weights(tmp_path / "saved"), all_weights(tmp_path / "native"))
    saved, converted = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "native"))
    assert saved["model_type"] == converted["model_type"] == "sail_vl2"
    assert saved["text_config"] | {"dtype": None} == converted["text_config"] | {"dtype": None}


def test_a_head_that_is_stored_is_not_tied(tmp_path, tokenizer):
    values, _ = write_release(tmp_path / "release", tokenizer, DENSE)
    values["llm_config"]["tie_word_embeddings"] = True  # as in Qwen3-1.7B's own config.json
    (tmp_path / "release" / "config.json").write_text(json.dumps(values))
    convert(tmp_path / "release", tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["tie_word_embeddings"] is False
    convert(tmp_path / "native", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == values


def rewrite(folder, change):
    """Change the weights of a release in one file."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_all_that_does_not_fit_is_told_at_once(tmp_path, release):
    def change(weights):
        weights["mlp1.1.weight"] = weights["mlp1.1.weight"].T.contiguous()
        weights["mlp1.9.weight"] = weights.pop("mlp1.3.weight")

    rewrite(release, change)
    with pytest.raises(BadInput) as mistake:
        convert(release, tmp_path / "native")
    told = str(mistake.value)
    assert "1 missing:\n    mlp1.3.weight" in told
    assert "1 unknown:\n    mlp1.9.weight" in told
    assert "1 of another shape:\n    mlp1.1.weight: [128, 48], expected [48, 128]" in told


def test_a_foreign_checkpoint(tmp_path, release):
    save_file({f"model.layers.{n}.weight": torch.zeros(2) for n in range(30)}, release / "model.safetensors")
    with pytest.raises(BadInput, match=r"30 unknown:\n    model\.layers\.0\.weight(.|\n)*and 10 more"):
        convert(release, tmp_path / "native")
    (release / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(BadInput, match="model_type = 'qwen3'"):
        convert(release, tmp_path / "native")


def test_parts_of_two_types_cannot_be_fused(tmp_path, release):
    convert(release, tmp_path / "native")
    key = "model.vision_tower.encoder.layers.0.attention.k_proj.weight"
    rewrite(tmp_path / "native", lambda weights: weights.update({key: weights[key].bfloat16()}))
    with pytest.raises(BadInput, match="F32, BF16, F32: they cannot be fused"):
        convert(tmp_path / "native", tmp_path / "again")


def break_file(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def break_index(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def hold_twice(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "b.safetensors")
    break_index(folder)


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


BROKEN = {
    "truncated": (break_file, "model.safetensors is damaged"),
    "no file": (break_index, "b.safetensors is missing"),
    "twice": (hold_twice, "holds tensors that another file holds too:\n    language_model"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has neither"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    "config of another kind": (lambda folder: (folder / "config.json").write_text("[]"), "holds list, not a mapping"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json names"),
    "other layer": (lambda folder: change_config(folder, select_layer=-4), "select_layer = -4; only -1 is supported"),
    "other language model": (
        lambda folder: change_config(folder, llm_config={"model_type": "qwen2"}),
        "llm_config.model_type = 'qwen2'; expected qwen3 or qwen3_moe",
    ),
    "text for a number": (
        lambda folder: change_config(folder, vision_config=VISION | {"hidden_size": "wide"}),
        "hidden_size",
    ),
}


@pytest.mark.parametrize(("spoil", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_source_ends_with_code_2_and_writes_nothing(tmp_path, release, monkeypatch, capsys, spoil, told):
    spoil(release)
    monkeypatch.setattr(sys, "argv", ["sail-rl", "convert", str(release), str(tmp_path / "native")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, release, monkeypatch):
    def full_disk(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("sail_rl.convert.write_weight_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        convert(release, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_the_command_and_its_dry_run(tmp_path, release, monkeypatch, capsys):
    target = tmp_path / "deep" / "native"
    for extra, done in ((["--dry-run"], False), (["--to", "native"], True)):
        monkeypatch.setattr(sys, "argv", ["sail-rl", "convert", str(release), str(target), *extra])
        main()
        assert f"{target}: native layout, head of its own" in capsys.readouterr().out
        assert target.exists() == done
    assert [path.name for path in target.parent.iterdir()] == ["native"]
    with pytest.raises(BadInput, match="not an empty folder"):
        convert(release, target)
    with pytest.raises(BadInput, match="has the native layout already"):
        convert(target, tmp_path / "other", "native")


def test_a_released_folder_with_missing_weights_is_not_loaded(release):
    rewrite(release, lambda weights: weights.pop("mlp1.3.weight"))
    with pytest.raises(BadInput, match=r"lacks.*model\.multi_modal_projector\.linear_2\.weight"):
        load_checkpoint(str(release), "float32")


COUNTS = {
    "2b": (16_793_600, 1_720_574_976 + 311_164_928),
    "8b": (41_963_520, 8_190_735_360),
    "a3b": (16_793_600, 30_532_122_624),
}


@pytest.mark.parametrize(("size", "adapter", "llm"), [(size, *counts) for size, counts in COUNTS.items()], ids=COUNTS)
def test_parameters_of_the_full_sizes(size, adapter, llm):
    with torch.device("meta"):
        model = SailVL2ForConditionalGeneration(sail_vl2_config(size))
    count = lambda part: sum(parameter.numel() for parameter in part.parameters())  # noqa: E731
    assert count(model.model.vision_tower) == 682_031_616
    assert count(model.model.multi_modal_projector) == adapter
    assert count(model.model.language_model) + count(model.lm_head) == llm
    assert model.config.image_seq_length == 256
