"""Checkpoints, recipes and files from strangers: nothing in them is run. Each would leave a marker if it were."""

import ast
import json
import os
import pickle

import pytest
import torch
import yaml
from conftest import ROOT
from tiny_models import processor_for_questions

from sail_rl.command_line import BadInput, load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.merge import merge_adapter, parents
from sail_rl.model.load import load_checkpoint, load_processor
from sail_rl.model.tiny import tiny_model
from sail_rl.run_folder import saved_recipe
from sail_rl.weight_files import read_weight_files

CODE = """
Path({marker!r}).touch()
"""


class Payload:
    """Unpickled, it makes the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """What nothing may make."""
    file = tmp_path / "marker"
    yield file
    assert not file.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny checkpoint."""
    folder, processor = tmp_path_factory.mktemp("models") / "tiny", processor_for_questions()
    tiny_model(processor, 0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy of it to spoil."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_payload_would_work(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.fault(
    fault="hostile: a pickle as weights",
    injected="pytorch_model.bin and adapter_model.bin that call os.system",
    expected="refused; nothing is run",
)
@pytest.mark.parametrize("form", ["plain", "torch"])
def test_weights_that_are_a_program(checkpoint, tmp_path, marker, form):
    def write(file):
        file.write_bytes(pickle.dumps(Payload(marker))) if form == "plain" else torch.save(Payload(marker), file)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": str(checkpoint)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write(adapter / "adapter_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsafe|cannot be loaded|unpickl"):
        merge_adapter(tmp_path / "merged", checkpoint, adapter)
    (checkpoint / "model.safetensors").unlink()
    write(checkpoint / "pytorch_model.bin")
    with pytest.raises(BadInput, match="the checkpoint cannot be loaded"):
        load_checkpoint(str(checkpoint), "float32")


@pytest.mark.fault(
    fault="hostile: a checkpoint's own Python files",
    injected="auto_map in config.json, processor_config.json and tokenizer_config.json",
    expected="the files are not imported, nobody is asked whether they may",
)
@pytest.mark.parametrize("known", [True, False], ids=["a type that we know", "a type of its own"])
def test_the_python_files_of_a_checkpoint(checkpoint, marker, monkeypatch, known):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (checkpoint / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = {
        "config.json": ["AutoConfig", "AutoModel", "AutoModelForImageTextToText"],
        "processor_config.json": ["AutoProcessor"],
        "tokenizer_config.json": ["AutoTokenizer", "AutoProcessor"],
    }
    for name, classes in names.items():
        file = checkpoint / name
        values = json.loads(file.read_text()) if file.is_file() else {}
        values["auto_map"] = {one: ["evil.Evil", None] if one == "AutoTokenizer" else "evil.Evil" for one in classes}
        values |= {} if known or name != "config.json" else {"model_type": "evil", "architectures": ["Evil"]}
        file.write_text(json.dumps(values))
    if known:
        load_checkpoint(str(checkpoint), "float32")
    else:
        with pytest.raises(BadInput, match="the checkpoint cannot be loaded"):
            load_checkpoint(str(checkpoint), "float32")


@pytest.mark.fault(
    fault="hostile: a chat template",
    injected="a template that reaches for os.system",
    expected="refused by the sandbox",
)
def test_a_chat_template_that_is_a_program(checkpoint, marker):
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (checkpoint / "chat_template.jinja").write_text(attack)
    processor = load_processor(str(checkpoint))
    with pytest.raises(Exception, match=r"(?i)unsafe|undefined|sandbox"):
        processor.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)


@pytest.mark.fault(
    fault="hostile: names of weight files",
    injected="an index whose files lie elsewhere: results would be written there",
    expected="refused",
)
@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/../../model.safetensors"])
def test_weight_files_that_lie_elsewhere(checkpoint, name):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadInput, match="which is no plain file name"):
        read_weight_files(checkpoint)


@pytest.mark.fault(
    fault="hostile: YAML that makes objects",
    injected="!!python/object/apply in a recipe, an override and a run's config.yaml",
    expected="refused with the file's name; nothing is run",
)
def test_recipes_that_are_programs(tmp_path, marker):
    attack = f"!!python/object/apply:os.system ['touch {marker}']"
    file = tmp_path / "config.yaml"
    file.write_text(f"seed: {attack}\n")
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(file.read_text())
    with pytest.raises(BadInput, match=r"config\.yaml is not valid YAML: .*python/object"):
        load_recipe(GrpoRecipe, file)
    with pytest.raises(BadInput, match="the value is not valid YAML"):
        load_recipe(GrpoRecipe, ROOT / "recipes/quickstart.yaml", [f"seed={attack}"])
    with pytest.raises(BadInput, match=r"config\.yaml is not the recipe of a run: .*python/object"):
        saved_recipe(tmp_path, GrpoRecipe)
    with pytest.raises(BadInput, match="is not the recipe of a run"):
        parents(tmp_path / "final")


# Who may do it: processes of ours that talk to each other, and nothing that came from elsewhere.
UNPICKLED_BY = {"rewards/worker.py", "sail_rl/data/workers.py"}
UNPACKERS = {"tarfile", "zipfile", "shelve", "marshal", "dill", "joblib", "cloudpickle"}
RUN_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "shutil.unpack_archive"}
UNSAFE = {"yaml.full_load", "yaml.unsafe_load", "numpy.load", "np.load", "pickle.load"}


@pytest.mark.fault(
    fault="hostile: archives, pickles and text that is run",
    injected="every call in sail_rl, rewards and rollouts",
    expected="no archive is unpacked; pickles come from our own processes alone; weights_only, safe YAML",
)
def test_what_comes_from_elsewhere_is_never_run():
    for file in sorted(
        path for package in ("sail_rl", "rewards", "rollouts") for path in (ROOT / package).rglob("*.py")
    ):
        name = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {getattr(node, "module", None)} | {alias.name for alias in node.names}
                assert not imported & UNPACKERS, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in RUN_TEXT | UNSAFE, (name, node.lineno)
                assert called != "pickle.loads" or name in UNPICKLED_BY, (name, node.lineno)
                assert called != "torch.load" or given.get("weights_only") == "True", (name, node.lineno)
                assert called != "yaml.load" or ast.unparse(node.args[1]) == "RecipeLoader", (name, node.lineno)
                assert given.get("trust_remote_code", "False") == "False", (name, node.lineno)
