"""Models copied to the Hub: by the real client, to a server of the test's own."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hub_server import TOKEN, hub_server

from sail_rl.command_line import BadInput
from sail_rl.data.stream import Shard
from sail_rl.hub import HubCopy
from sail_rl.launch import Run

NAME = "me/tiny"


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def copies_of(folder, repository=NAME, shard=None) -> HubCopy:
    recipe = SimpleNamespace(trainer=SimpleNamespace(push_to_hub=repository))
    return HubCopy(Run(recipe, folder, None, shard or Shard()))


def checkpoint(folder, step, weights=b"weights"):
    target = folder / "checkpoints" / f"step_{step}"
    (target / "deepspeed").mkdir(parents=True)
    for name in ("trainer_state.pt", "manifest.json", "deepspeed/rank_0.pt", "config.json"):
        (target / name).write_text("{}")
    (target / "model.safetensors").write_bytes(weights)
    return target


def test_a_checkpoint_is_sent_while_training_goes_on_and_outlives_its_folder(tmp_path, hub):
    copies = copies_of(tmp_path)
    assert hub.visibility == {NAME: "private"}
    hub.gate.clear()
    first = checkpoint(tmp_path, 1)
    copies.send(first)
    # The next save and the removal of the old checkpoint come while the first is still on its way.
    copies.send(checkpoint(tmp_path, 2, b"newer"))
    for file in sorted(first.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert hub.arrived.wait(30)
    hub.gate.set()
    copies.sending.join(30)
    assert hub.commits == ["sail_rl: step_1"]
    assert hub.repositories[NAME] == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert copies.failed == 0


def test_a_failed_copy_is_told_and_the_next_one_is_sent(tmp_path, hub, capsys):
    copies = copies_of(tmp_path)
    hub.failing = True
    copies.send(checkpoint(tmp_path, 1))
    copies.sending.join(30)
    assert copies.failed == 1
    assert f"WARNING: step_1 could not be copied to {NAME}: BadRequestError" in capsys.readouterr().err
    copies.finish(checkpoint(tmp_path, 2))
    assert f"WARNING: `hf upload {NAME} " in capsys.readouterr().err
    hub.failing = False
    copies.send(checkpoint(tmp_path, 3))
    copies.finish(checkpoint(tmp_path, 4, b"last"))
    assert hub.commits == ["sail_rl: step_3", "sail_rl: final model"]
    assert hub.repositories[NAME]["model.safetensors"] == b"last"


def test_the_whole_model_replaces_adapters(tmp_path, hub):
    copies = copies_of(tmp_path)
    adapters = tmp_path / "checkpoints/step_1"
    adapters.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapters / name).write_text("{}")
    copies.send(adapters)
    final = tmp_path / "final"
    (final / "adapter").mkdir(parents=True)
    (final / "model.safetensors").write_bytes(b"whole")
    (final / "adapter/adapter_config.json").write_text("{}")
    copies.finish(final)
    assert set(hub.repositories[NAME]) == {"model.safetensors", "adapter/adapter_config.json"}


def test_a_repository_that_cannot_be_written_is_told_before_training(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(BadInput, match=r"trainer.push_to_hub = 'me/tiny': .*HF_TOKEN"):
        copies_of(tmp_path)
    with pytest.raises(BadInput, match="of the first"):  # and by every process
        copies_of(tmp_path, shard=Shard(1, 2, lambda own: ["of the first", *own]))
    assert hub.repositories == {}


def test_a_run_sends_its_checkpoints_and_its_final_model(tmp_path, hub):
    changes = ("model={random_init: tiny}", "trainer.max_steps=2", "trainer.save_every=1", "sft.samples_per_step=2")
    more = ("data.eval=null", "trainer.eval_every=null", f"output_dir={tmp_path}/run", f"trainer.push_to_hub={NAME}")
    ran = subprocess.run(
        [sys.executable, "sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *changes, *more],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert hub.commits[-1] == "sail_rl: final model"
    assert hub.commits[0] == "sail_rl: step_1"
    final = tmp_path / "run/final"
    sent = hub.repositories[NAME]
    assert sent == {file.name: file.read_bytes() for file in final.iterdir() if file.is_file()}
    assert json.loads(sent["config.json"])["model_type"]
    assert f"copying {final} to {NAME}" in ran.stdout
