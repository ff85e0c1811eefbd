"""Model soups: the mean of related checkpoints and of no others; adapters in their model's weights."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import dense, mixture, processor_for_questions
from transformers import AutoModelForImageTextToText, AutoProcessor

from sail_rl.checkpoint import save_model
from sail_rl.cli import main
from sail_rl.command_line import BadInput
from sail_rl.config_data import LoraSection, ModelSection
from sail_rl.merge import ancestors, evaluated, loss_by_merging, mean, merge
from sail_rl.model.load import load_model
from sail_rl.model.lora import lora_layers, save_adapters

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(model, seed, share):
    """A copy whose weights have all gone a share of their size in random directions."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight += share * weight.std() * torch.randn(weight.shape, generator=generator) if weight.numel() > 1 else 0
    return other


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two sisters, one of them in small files; a stranger; another kind of model."""
    folder, processor = tmp_path_factory.mktemp("models"), processor_for_questions()
    model = dense(processor)
    save_model(folder / "a", moved(model, 1, 0.05), processor)
    save_model(folder / "b", moved(model, 2, 0.05), processor)
    (folder / "b/model.safetensors").unlink()
    moved(model, 2, 0.05).save_pretrained(folder / "b", max_shard_size="1MB")
    save_model(folder / "stranger", moved(model, 3, 50.0), processor)
    save_model(folder / "other", mixture(processor), processor)
    return folder


def weights_of(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ([3.0, 1.0], (0.75, 0.25))])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_soup_is_the_mean_of_its_sources(checkpoints, tmp_path, weights, shares, order):
    first, second = (checkpoints / name for name in order)
    soup = merge(tmp_path / "soup", [first, second], weights)
    assert 0 < soup.distances[1] < 0.2
    one, two, found = (weights_of(folder) for folder in (first, second, tmp_path / "soup"))
    assert one.keys() == found.keys()
    for name, tensor in found.items():
        expected = shares[0] * one[name].double() + shares[1] * two[name].double()
        assert torch.equal(tensor, expected.float()), name
    files = {path.name for path in (tmp_path / "soup").iterdir()}
    assert files == {path.name for path in first.iterdir()} | {"merge.json"}
    if order == "ab":
        assert AutoProcessor.from_pretrained(tmp_path / "soup").chat_template


def test_a_mean_is_rounded_once_and_of_equals_is_the_same(monkeypatch):
    monkeypatch.setattr("sail_rl.merge.AT_ONCE", 7)
    tensors = [torch.randn(5, 9, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    expected = torch.stack([tensor.double() for tensor in tensors]).mean(0).bfloat16()
    assert torch.equal(mean(tensors, [1 / 3] * 3), expected)
    assert torch.equal(mean([tensors[0]] * 3, [1 / 3] * 3), tensors[0])


def test_a_stranger_is_refused_unless_forced(checkpoints, tmp_path):
    sources = [checkpoints / "a", checkpoints / "stranger"]
    with pytest.raises(BadInput, match=r"stranger and .*a share no ancestor: none is recorded, .* --force makes it"):
        merge(tmp_path / "soup", sources)
    assert list(tmp_path.iterdir()) == []
    assert merge(tmp_path / "soup", sources, force=True).distances[1] > 1


def test_a_recorded_ancestor_speaks_for_a_distant_checkpoint(checkpoints, tmp_path):
    """Runs that name the same start in their recipes; and a soup of them is a relative of both."""
    finals = []
    for name in ("a", "stranger"):
        run = tmp_path / name
        run.mkdir()
        (run / "final").symlink_to(checkpoints / name)
        start = {"path": "some/model", "random_init": None}
        (run / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "model": start}))
        finals.append(run / "final")
    with pytest.raises(BadInput, match="share no ancestor"):
        merge(tmp_path / "soup", [finals[0], checkpoints / "stranger"])
    merge(tmp_path / "soup", finals)
    assert "some/model" in ancestors(str(tmp_path / "soup"))
    assert json.loads((tmp_path / "soup/merge.json").read_text())["weights"] == [0.5, 0.5]
    fresh = {"path": None, "random_init": "tiny"}
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump({"seed": 3, "model": fresh}))
    assert "fresh weights: tiny, seed 3" in ancestors(str(finals[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "needs two checkpoints or more"),
        (["a", "other"], r"other is another model than .*a: \d+ tensors differ, such as"),
        (["a", "b", "--weights", "1"], r"--weights [1.0]: give 2 numbers above 0"),
        (["a", "b", "--weights", "1", "-1"], r"give 2 numbers above 0"),
        (["a", "missing"], "missing has neither model.safetensors nor"),
        (["a", "b", "--adapter", "a"], "name the one checkpoint that the adapters belong to"),
        (["a", "--adapter", "b"], "there is no adapter_config.json"),
    ],
)
def test_mistakes_are_named(checkpoints, tmp_path, monkeypatch, capsys, arguments, message):
    names = [str(checkpoints / word) if word.isalpha() else word for word in arguments]
    monkeypatch.setattr("sys.argv", ["sail-rl", "merge", str(tmp_path / "soup"), *names])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert re.search(message.replace("[", r"\[").replace("--", "-+"), capsys.readouterr().err)
    assert not (tmp_path / "soup").exists()


def test_adapters_are_merged_into_their_model(checkpoints, tmp_path, monkeypatch, capsys):
    lora = ModelSection(path=str(checkpoints / "a"), lora=LoraSection(r=4, lora_alpha=8))
    model, generator = load_model(lora, seed=0)[0], torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        weight = layer.lora_B["default"].weight.data
        weight.copy_(torch.randn(weight.shape, generator=generator))
    save_adapters(tmp_path / "adapter", model)
    save_model(tmp_path / "expected", model, processor_for_questions())
    command = ["sail-rl", "merge", str(tmp_path / "merged"), str(checkpoints / "a"), "--adapter"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "adapter")])
    main()
    assert "with the adapters of" in capsys.readouterr().out
    found, expected, before = (
        weights_of(folder) for folder in (tmp_path / "merged", tmp_path / "expected", checkpoints / "a")
    )
    assert found.keys() == expected.keys()
    assert sum(not torch.equal(found[name], before[name]) for name in found) == len(lora_layers(model))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template


@pytest.fixture
def eval_recipe(tmp_path):
    """Eight questions about cards, in both modes."""
    eval_ = [{"source": "pictures", "families": ["cards"], "kind": kind, "rows": 4} for kind in ("cot", "direct")]
    data = {"train": "pictures", "eval": eval_, "thinking": "by_kind"}
    recipe = {"output_dir": "runs/x", "model": "x", "data": data, "sft": {"max_completion_length": 4}}
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump(recipe | {"trainer": {"max_steps": 1}}))
    return file


def test_sources_and_soup_are_evaluated(checkpoints, tmp_path, monkeypatch, capsys, eval_recipe):
    sources = [str(checkpoints / name) for name in "ab"]
    monkeypatch.setattr(
        "sys.argv", ["sail-rl", "merge", str(tmp_path / "soup"), *sources, "--recipe", str(eval_recipe)]
    )
    main()
    record = json.loads((tmp_path / "soup/merge.json").read_text())
    assert list(record["before"]) == sources
    for found in [*record["before"].values(), record["after"]]:
        assert found["questions"] == 8
        assert found["kinds"].keys() == {"cot", "direct"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.yaml", "soup"]
    assert capsys.readouterr().out.count("accuracy 0.") == 3


def test_a_recipe_without_questions_is_refused_before_anything_is_written(checkpoints, tmp_path, eval_recipe):
    recipe = yaml.safe_load(eval_recipe.read_text())
    del recipe["data"]["eval"]
    eval_recipe.write_text(yaml.safe_dump(recipe))
    with (
        pytest.raises(BadInput, match=r"eval.yaml: data.eval names no questions"),
        evaluated(eval_recipe, tmp_path / "soup", [checkpoints / "a"], None),
    ):
        pytest.fail("the merge was begun")


@pytest.mark.parametrize(
    ("sources", "merged", "message"),
    [
        ([0.5, 0.7], 0.7, None),
        ([0.5, 0.7], 0.65, None),
        ([0.5, 0.7], 0.64, "is worse than the mean of its sources: 0.640 by 0.650"),
    ],
)
def test_a_soup_below_the_mean_is_named(sources, merged, message):
    assert loss_by_merging(sources, [0.25, 0.75], merged) == message


def test_a_merge_holds_less_than_two_files(tmp_path):
    """Three sources of two files of 32 MB, in 64 tensors each: a process holds less than two beside what is mapped."""
    files, tensors = 2, 64
    for source in range(3):
        folder = tmp_path / str(source)
        folder.mkdir()
        names = {f"w{n}": f"part-{n // tensors}.safetensors" for n in range(tensors * files)}
        for file in sorted(set(names.values())):
            mine = {name: torch.full((2, 2**16), 1.0 + source / 10) for name, of in names.items() if of == file}
            save_file(mine, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    program = (
        "import sys, threading, time; from pathlib import Path; import torch; from sail_rl import merge\n"
        "merge.AT_ONCE = 2**12  # as small beside these tensors as it is beside real ones\n"
        "torch.set_num_threads(1); torch.zeros(9).double().mean()\n"
        "def held(): return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0])\n"
        "start, highest, ended = held(), [0], threading.Event()\n"
        "def watch():\n"
        "    while not ended.wait(0.001): highest[0] = max(highest[0], held())\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "merge.merge(Path(sys.argv[1]) / 'soup', [Path(sys.argv[1]) / n for n in '012'])\n"
        "ended.set(); print((highest[0] - start) / 1024)"
    )
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 1 < float(found.stdout) < 2 * 32
    assert load_file(tmp_path / "soup/part-0.safetensors")["w0"].unique().tolist() == pytest.approx([1.1])
