"""The files for clusters and launchers: they parse, what they name exists, and the trainers take their commands."""

import re
import subprocess

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from conftest import ROOT

from sail_rl.command_line import load_recipe
from sail_rl.config import GrpoRecipe
from sail_rl.config_pipeline import trainer_of

CLUSTER = ROOT / "recipes/cluster"
CONFIGURATIONS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
NAMED = re.compile(r"(?:recipes|sail_rl)/[\w/]+\.(?:yaml|py|sbatch)")


@pytest.mark.parametrize("file", [*CONFIGURATIONS, *sorted(CLUSTER.iterdir())], ids=lambda file: file.name)
def test_every_file_that_is_named_exists(file):
    named = set(NAMED.findall(file.read_text()))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_accelerate_takes_its_configuration(file):
    """The launcher refuses unknown keys by itself."""
    config = load_config_from_file(str(file))
    machines = 2 if file.stem.endswith("2x8") else 1
    assert config.num_machines == machines
    assert config.num_processes % machines == 0
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if config.distributed_type == "DEEPSPEED":
        offloaded = "cpu" if "offload" in file.stem else "none"
        assert config.deepspeed_config["offload_optimizer_device"] == offloaded
        assert config.deepspeed_config["zero_stage"] == (2 if "zero2" in file.stem else 3)


def test_the_slurm_script():
    """Its syntax, what SLURM reads, and the trainer's keys."""
    text = (CLUSTER / "slurm.sbatch").read_text()
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sbatch")], check=True)
    options = dict(line[len("#SBATCH --") :].partition("=")[::2] for line in text.splitlines() if line[:3] == "#SB")
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    nodes = load_config_from_file(str(ROOT / "recipes/accelerate/fsdp2_2x8.yaml"))
    assert int(options["nodes"]) == nodes.num_machines + 1  # and the server's
    assert int(options["gpus-per-node"]) * nodes.num_machines == nodes.num_processes
    read_keys(
        re.search(r"RECIPE=(\S+)", text)[1], ["rollout.engine=vllm_server", "rollout.server.urls=[http://n:8000]"]
    )


def test_a_preempted_slurm_job_is_told_and_queued_again(tmp_path):
    """The script itself, with commands in SLURM's place: the signal reaches the trainer, which ends with 75."""
    (tmp_path / "bin").mkdir()
    commands = {
        "scontrol": f'if [ "$1" = show ]; then printf "a\\nb\\nc\\n"; else echo "$@" >> {tmp_path}/told; fi',
        "srun": f'case "$*" in *serve-rollouts*) exec sleep 60;; *) echo "$*" > {tmp_path}/asked\n'
        "trap 'exit 75' TERM; touch " + f"{tmp_path}/ready; for i in $(seq 600); do sleep 0.1; done;; esac",
    }
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sbatch")],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_NODELIST": "[a-c]", "SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    script.terminate()
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 75
    assert "preempted and saved" in output
    assert (tmp_path / "told").read_text() == "requeue 7\n"
    asked = (tmp_path / "asked").read_text()
    assert "--main_process_ip a" in asked
    assert "rollout.server.urls=[http://c:8000,http://c:8001" in asked


def test_the_kubernetes_objects():
    service, server, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert [one["kind"] for one in (service, server, job)] == ["Service", "Deployment", "Job"]
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == server["spec"]["selector"]["matchLabels"] == labels
    pod = job["spec"]["template"]["spec"]
    (trainer,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["terminationGracePeriodSeconds"] >= 120
    exits = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (exits["containerName"], exits["values"]) == (trainer["name"], [2])
    assert {mount["name"] for mount in trainer["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    gpus = trainer["resources"]["limits"]["nvidia.com/gpu"]
    command = trainer["command"]
    assert load_config_from_file(str(ROOT / command[command.index("--config_file") + 1])).num_processes == gpus
    place = command.index("sail_rl/train_grpo.py")
    recipe = read_keys(command[place + 1], command[place + 2 :])
    assert recipe.rollout.server.urls == [f"http://{service['metadata']['name']}:8000"]


def read_keys(recipe, overrides):
    """The recipe with these keys, as its trainer reads it."""
    assert trainer_of(ROOT / recipe) is GrpoRecipe
    return load_recipe(GrpoRecipe, ROOT / recipe, overrides)
