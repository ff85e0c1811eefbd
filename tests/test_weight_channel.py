"""Weights through a process group: gloo here, NCCL on GPUs."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from rollouts.weight_channel import Receiver, Sender, header_of

LIMIT = 30.0
WEIGHTS = {
    "a.weight": torch.randn(7, 5),
    "b.weight": torch.randn(3, 2, 4).bfloat16(),
    "c.bias": torch.arange(6, dtype=torch.float64),
}


@pytest.fixture
def shards(tmp_path):
    """Two files, as the trainer writes them."""
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    save_file({name: WEIGHTS[name] for name in ("a.weight", "b.weight")}, paths[0], metadata={"format": "pt"})
    save_file({"c.bias": WEIGHTS["c.bias"]}, paths[1])
    return paths


def test_all_of_it_crosses_and_again(shards):
    sender = Sender("127.0.0.1", LIMIT)
    told = sender.told(shards)
    with ThreadPoolExecutor() as threads:
        receiving = threads.submit(Receiver, told["address"], told["limit"])
        for _ in range(2):  # the group stays for the next push
            sending = threads.submit(sender.send, shards)
            found = {name: tensor.clone() for name, tensor in receiving.result().receive(told["headers"])}
            sending.result()
            assert found.keys() == WEIGHTS.keys()
            assert all(torch.equal(found[name], wanted) for name, wanted in WEIGHTS.items())
            assert all(found[name].dtype == wanted.dtype for name, wanted in WEIGHTS.items())


def test_headers_are_those_of_the_files(shards):
    header, start = header_of(shards[0])
    assert {name: told["shape"] for name, told in header.items()} == {"a.weight": [7, 5], "b.weight": [3, 2, 4]}
    assert shards[0].stat().st_size == start + max(told["data_offsets"][1] for told in header.values())


RECEIVER = """
import sys
from rollouts.weight_channel import Receiver
receiver = Receiver(["127.0.0.1", int(sys.argv[1])], 30.0)
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault(
    fault="server: killed during a push",
    injected="SIGKILL of the receiver",
    expected="the push ends with an error within the limit",
)
def test_a_server_that_is_killed_ends_the_push(shards):
    """The sender does not wait for its limit."""
    sender = Sender("127.0.0.1", LIMIT)
    server = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, str(sender.address[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    errors: list[Exception] = []

    def send():
        try:
            for _ in range(1000):  # more than fits into buffers
                sender.send(shards)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    assert server.stdout.readline() == "connected\n"
    time.sleep(0.5)
    server.kill()
    started = time.monotonic()
    thread.join(LIMIT)
    sender.close()
    assert errors
    assert time.monotonic() - started < LIMIT / 2
    server.wait()


ON_ITS_OWN_GPU = """
import json, sys
from rollouts.weight_channel import Receiver
told = json.loads(sys.stdin.readline())
found = dict((name, tensor.double().sum().item()) for name, tensor in Receiver(*told["at"]).receive(told["headers"]))
print(json.dumps(found))
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two processes on one GPU")
def test_from_gpu_to_gpu(shards):
    sender = Sender("127.0.0.1", LIMIT)
    told = sender.told(shards)
    server = subprocess.Popen(
        [sys.executable, "-c", ON_ITS_OWN_GPU],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "1"},
    )
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(sender.send, shards)
        question = json.dumps({"at": [told["address"], told["limit"]], "headers": told["headers"]})
        answer, _ = server.communicate(question + "\n", timeout=4 * LIMIT)
        sending.result()
    expected = {name: tensor.double().sum().item() for name, tensor in WEIGHTS.items()}
    assert json.loads(answer) == pytest.approx(expected)
