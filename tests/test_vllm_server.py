"""vLLM in a process of its own: it agrees with the trainer, and every fault of a server ends in whole groups or a stop.

One real server serves the module; a proxy in front of it makes the mistakes that it does not make.
"""

import copy
import signal
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from accelerate import Accelerator
from PIL import Image
from rollout_proxy import Proxy, changed
from test_vllm_colocate import CLOSE, FAR, GROUP, LENGTH, VALUES, change, gap, gate
from tiny_models import dense, groups, processor_for_questions

import rollouts.vllm_server
from rollouts import Sampling, wire
from rollouts.hf import HFEngine
from rollouts.server_link import Lacking, Refused
from rollouts.vllm_server import Crew, Limits, ServerEngine
from sail_rl.checkpoint import full_parameters
from sail_rl.command_line import BadInput
from sail_rl.config import GrpoRecipe
from sail_rl.data.stream import Shard
from sail_rl.engines import make_engine
from sail_rl.launch import Run
from sail_rl.model.load import image_token_ids
from sail_rl.sharding import Whole

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SERVER = {"start_limit": 200, "request_limit": 60, "push_limit": 60, "restarts": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a server with it, prompts with 0, 1 and 2 pictures, and a run around them."""
    folder = tmp_path_factory.mktemp("run")
    processor = processor_for_questions()
    model = dense(processor)
    suppressed = image_token_ids(model, processor)
    prompts = [replace(group.prompt, seed=number) for number, group in enumerate(groups(processor))]
    rollout = VALUES["rollout"] | {"engine": "vllm_server", "server": SERVER}
    recipe = GrpoRecipe(output_dir=str(folder), **VALUES | {"rollout": rollout})
    run = Run(recipe, folder, Accelerator(cpu=True), Shard())
    wire.SHARD = 2**18  # several files
    engine = make_engine(run, Whole(model, nullcontext), processor, suppressed)
    with pytest.raises(RuntimeError, match="lacks weights"):
        engine.generate(prompts, 1, Sampling(LENGTH))
    yield SimpleNamespace(
        model=model, processor=processor, engine=engine, prompts=prompts, suppressed=suppressed, run=run
    )
    engine.close()
    wire.SHARD = 2**28


@pytest.fixture
def model(world):
    """A model that a test may change, as the server has it."""
    world.engine.load_weights(full_parameters(world.model), 0)
    return copy.deepcopy(world.model)


@pytest.fixture
def naps(monkeypatch):
    """Seconds of waiting between tries, which tests do without."""
    slept = []
    monkeypatch.setattr(rollouts.vllm_server, "sleep", slept.append)
    return slept


def another_engine(world, urls, **limits):
    """A trainer's engine over servers that run already."""
    limits = Limits(**{"start": 60, "push": 60, "request": 60, "restarts": 2} | limits)
    folder = world.run.folder / "other"
    vocabulary = world.model.config.get_text_config().vocab_size
    setup = wire.unpack_setup(world.engine.setup)
    return ServerEngine(setup, vocabulary, urls, folder, limits, Crew(), give_up=BadInput)


def test_pushed_weights_are_the_trainers(world, model):
    assert len(world.engine.shards) > 3
    assert gap(world, model) < CLOSE
    change(model, "")
    assert gap(world, model) > FAR
    world.engine.load_weights(full_parameters(model), 7)
    assert gap(world, model) < CLOSE
    assert gap(world, model, temperature=0.7) < CLOSE
    assert {r.weight_version for r in world.engine.generate(world.prompts, 2, Sampling(2))} == {7}


def test_greedy_answers_are_those_of_the_reference_engine(world, model):
    reference = HFEngine(model, world.processor.tokenizer, world.suppressed)
    reference.load_weights(iter(()), 0)
    sampling = Sampling(LENGTH, temperature=0)
    expected = reference.generate(world.prompts, 2, sampling)
    assert_alike(world.engine.generate(world.prompts, 2, sampling), expected)


def assert_alike(found, expected):
    """The same completions; log-probabilities may be rounded otherwise where other prompts share a batch."""
    for ours, theirs in zip(found, expected, strict=True):
        assert replace(ours, log_probs=[]) == replace(theirs, log_probs=[])
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=CLOSE)


def test_the_gate(world, model, capsys):
    gate(world, model, world.prompts)
    assert "parity with the engine: log-probabilities" in capsys.readouterr().out
    grey = replace(world.prompts[1], images=(Image.new("RGB", world.prompts[1].images[0].size, "grey"),))
    with pytest.raises(BadInput, match="pictures: the engine's model reads other pixels"):
        gate(world, model, [world.prompts[0], grey])


@pytest.mark.fault(
    fault="server: half the weights",
    injected="a push that is cut off",
    expected="it refuses to write until a whole push",
)
def test_a_half_done_push(world, model):
    """The server refuses to write; then the whole push is made again, by itself."""
    link = world.engine.links[0]
    sampling = Sampling(LENGTH, seed=1)
    expected = world.engine.generate(world.prompts, GROUP, sampling)
    content = wire.pack({"version": 0, "weights": "half"})
    half = world.engine.shards[0].read_bytes()[:1000]
    port = int(link.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /push HTTP/1.0\r\nX-Limit: 60\r\nContent-Length: 99999\r\n\r\n")
        connection.sendall(wire.length_of(content) + content + (50000).to_bytes(8, "little") + half)
        connection.shutdown(socket.SHUT_WR)
        assert b"the connection was lost in the middle" in b"".join(iter(lambda: connection.recv(9999), b""))
    for weights in ("half", world.engine.weights):
        question = wire.pack_question(world.prompts, GROUP, sampling, weights)
        with pytest.raises(Lacking, match="the server has the weights None"):
            link.call("/generate", 60, question)
    process = link.process
    assert world.engine.generate(world.prompts, GROUP, sampling) == expected
    assert link.process is process


@pytest.mark.fault(
    fault="server: a tensor is missing from the push",
    injected="one name left out",
    expected="the run ends at once and names it",
)
def test_names_that_are_missing(world, model, naps):
    """A mistake that no second try can mend ends at once."""
    pushed = list(full_parameters(model))
    world.engine.load_weights(iter(pushed[:3] + pushed[4:]), 4)
    with pytest.raises(BadInput, match=rf"weights of version 4: {pushed[3][0]} did not come"):
        world.engine.generate(world.prompts, 1, Sampling(2))
    assert naps == []


def test_a_prompt_that_is_too_long(world, model, naps):
    long = replace(world.prompts[0], token_ids=world.prompts[0].token_ids + [70] * 1000)
    with pytest.raises(BadInput, match="maximum context length is 410"):
        world.engine.generate([world.prompts[1], long], GROUP, Sampling(LENGTH))
    assert naps == []
    assert gap(world, model) < CLOSE


def test_two_trainers_at_one_server(world, model):
    """Weights of the same version, but not the same weights: each gets what its own would write."""
    sampling = Sampling(LENGTH, seed=1)
    expected = world.engine.generate(world.prompts, GROUP, sampling)
    other = another_engine(world, [world.engine.links[0].url])
    change(model, "")
    other.load_weights(full_parameters(model), 0)
    assert other.generate(world.prompts, GROUP, sampling) != expected
    assert world.engine.generate(world.prompts, GROUP, sampling) == expected


@pytest.mark.fault(
    fault="server: has another model",
    injected="a second trainer with another setup",
    expected="refused",
)
def test_another_model_at_a_server_in_use(world):
    setup = replace(wire.unpack_setup(world.engine.setup), end_token_ids=[5])
    with pytest.raises(Refused, match="already has the engine of another model"):
        world.engine.links[0].call("/start", 60, wire.pack_setup(setup))


def without_a_completion(groups):
    groups[-1]["rollouts"].pop()


SPOILT = {
    "fewer samples": (without_a_completion, "2 completions of a prompt, not 3"),
    "fewer groups": (lambda groups: groups.pop(), "answers 2 of 3 prompts"),
    "a group twice": (lambda groups: groups.__setitem__(2, groups[0]), "answers a prompt twice"),
    "groups of other prompts": (lambda groups: groups[2].update(place=0), "answers other prompts"),
    "a token of no word": (lambda groups: groups[0]["rollouts"][0]["token_ids"].__setitem__(0, 10**6), "cannot write"),
    "a stale version": (lambda groups: groups[0]["rollouts"][0].update(weight_version=-1), "weights of version -1"),
    "another form": (lambda groups: groups[0].pop("rollouts"), "another form"),
    "an error": (lambda status, content: (500, b'{"error": "out of memory"}'), "out of memory"),
    "another server": (lambda status, content: (404, b'["no such page"]'), "no such page"),
    "no JSON": (lambda status, content: (200, b"<html>"), "JSONDecodeError"),
    "cut short": (lambda status, content: (200, content[: content.index(b"\n") + 1]), "cut short"),
    "cut within a group": (lambda status, content: (200, content[:99], len(content)), "JSONDecodeError"),
    "hung up": (lambda status, content: None, "RemoteDisconnected"),
    "late": (lambda status, content: time.sleep(10), "no answer within 8 s"),
}


def spoiling(how, times):
    """A proxy's `spoil` which is at fault so many times, then honest."""
    change, _ = SPOILT[how]
    left = [None] * times

    def spoil(path, status, content):
        if path != "/generate" or not left:
            return status, content
        left.pop()
        whole = change.__code__.co_varnames[:1] == ("status",)
        return change(status, content) if whole else (status, changed(content, change))

    return spoil


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.fault(
    fault="server: spoilt answers",
    injected="fewer samples, wrong ids, stale weights, errors, cut, hung up, late",
    expected="asked for again as a whole; the same completions",
)
def test_a_spoilt_answer_is_asked_for_again(how, world, model, naps, capsys):
    """As a whole; the second try gives what the first would have given. All groups are there, each of its prompt."""
    sampling = Sampling(LENGTH, seed=1)
    expected = world.engine.generate(world.prompts, GROUP, sampling)
    proxy = Proxy(world.engine.links[0].url, spoil=spoiling(how, 1)).start()
    engine = another_engine(world, [proxy.url], request=8 if how == "late" else 60)
    engine.load_weights(full_parameters(model), 0)
    assert_alike(engine.generate(world.prompts, GROUP, sampling), expected)
    assert naps == [1]
    assert [path for path, _ in proxy.asked] == ["/start", "/push", "/generate"] * 2
    told = capsys.readouterr().err
    assert SPOILT[how][1] in told
    assert "try 1 of 2: the server gets, once it is there, the weights again" in told


@pytest.mark.fault(
    fault="server: always wrong",
    injected="fewer samples each time",
    expected="bounded tries, then exit code 2",
)
def test_a_server_that_stays_wrong_ends_the_run(world, model, naps):
    proxy = Proxy(world.engine.links[0].url, spoil=spoiling("fewer samples", 9)).start()
    engine = another_engine(world, [proxy.url])
    engine.load_weights(full_parameters(model), 0)
    with pytest.raises(BadInput, match=rf"rollout server {proxy.url}: it answers with 2 completions"):
        engine.generate(world.prompts, GROUP, Sampling(LENGTH))
    assert naps == [1, 2]


def test_weights_by_a_process_group(world, model, naps):
    """gloo here, NCCL on GPUs: one group for all pushes, and another one after a fault."""
    engine = another_engine(world, [world.engine.links[0].url], channels=True)
    ours = SimpleNamespace(**vars(world) | {"engine": engine})
    for version in (1, 2):
        change(model, "")
        engine.load_weights(full_parameters(model), version)
        assert gap(ours, model) < CLOSE
    (channel,) = engine.channels.values()
    channel.close()
    change(model, "")
    engine.load_weights(full_parameters(model), 3)
    assert gap(ours, model) < CLOSE
    assert engine.channels[0] is not channel
    engine.close()


def test_two_servers_share_the_prompts(world, model, naps):
    """By whole groups; what the good server has given is not asked for again."""
    sampling = Sampling(LENGTH, seed=1)
    expected = world.engine.generate(world.prompts, GROUP, sampling)
    url = world.engine.links[0].url
    good, bad = Proxy(url).start(), Proxy(url, spoil=spoiling("an error", 1)).start()
    engine = another_engine(world, [good.url, bad.url])
    engine.load_weights(full_parameters(model), 0)
    # Both stand for one real server.
    assert_alike(engine.generate(world.prompts, GROUP, sampling), expected)
    questions = [[wire.unpack(body[8:])[0] for path, body in p.asked if path == "/generate"] for p in (good, bad)]
    assert [[len(asked["prompts"]) for asked in one] for one in questions] == [[2, 1], [1]]
    assert {asked["group_size"] for one in questions for asked in one} == {GROUP}


@pytest.mark.fault(
    fault="server: is not there",
    injected="a closed port",
    expected="given up within the limit",
)
def test_nobody_listens(world, naps):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(BadInput, match=rf"rollout server {url}/start: ConnectionRefusedError"):
        another_engine(world, [url], start=1.2, restarts=1)
    assert time.monotonic() - begin < 60


@pytest.mark.fault(
    fault="server: killed",
    injected="SIGKILL in the middle of an answer",
    expected="started anew with the weights; the same completions, each told once",
)
def test_killed_in_the_middle_of_an_answer(world, model, capsys):
    """A new process, the same weights, and the completions that the old one would have written.

    Groups that had come are not written again, and each is told once.
    """
    # The engine has room for less than a group at a time, so that the last is far off when the first comes,
    # however late this process hears of it.
    sampling, prompts = Sampling(LENGTH, seed=1), world.prompts * 8
    expected = world.engine.generate(prompts, 8, sampling)
    killed = world.engine.links[0].process
    told = []

    def finished(place, group):
        if not told:
            killed.send_signal(signal.SIGKILL)
        assert_alike(group, expected[8 * place :][:8])
        told.append(place)

    assert_alike(world.engine.generate(prompts, 8, sampling, finished), expected)
    assert sorted(told) == list(range(len(prompts)))
    assert not psutil.pid_exists(killed.pid)
    told = capsys.readouterr().err
    assert "it was killed by signal 9; the end of" in told
    assert "try 1 of 2: the server is started anew, it gets the weights again" in told
    assert gap(world, model) < CLOSE


@pytest.mark.slow
@pytest.mark.fault(
    fault="server: hangs",
    injected="SIGSTOP",
    expected="given up after the limit, killed, replaced",
)
def test_a_server_that_hangs(world, model, monkeypatch, capsys):
    """It is given up after the limit, killed and replaced."""
    monkeypatch.setattr(world.engine, "limits", replace(world.engine.limits, request=20))
    expected = world.engine.generate(world.prompts, GROUP, Sampling(LENGTH, seed=1))
    hanging = world.engine.links[0].process
    hanging.send_signal(signal.SIGSTOP)
    assert world.engine.generate(world.prompts, GROUP, Sampling(LENGTH, seed=1)) == expected
    assert "/generate: no answer within 20 s" in capsys.readouterr().err
    assert not psutil.pid_exists(hanging.pid)


@pytest.mark.slow
@pytest.mark.fault(
    fault="server: cannot start",
    injected="too little memory",
    expected="bounded tries, vLLM's words, no process left",
)
def test_a_server_that_cannot_start(world, naps, tmp_path, capsys):
    """Too little memory: tried again, then told in vLLM's words, and no process is left."""
    setup = wire.unpack_setup(world.engine.setup)
    setup = replace(setup, settings=replace(setup.settings, kv_cache_gib=10**6))
    with pytest.raises(BadInput, match=r"rollout server .*/start: .*memory"):
        ServerEngine(setup, 9, [], tmp_path, Limits(100, 9, 9, restarts=1), Crew(), give_up=BadInput)
    assert naps == [1]
    assert "try 1 of 1: the server is started anew" in capsys.readouterr().err
    assert not [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]
