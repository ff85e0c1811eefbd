"""What crosses between trainer and rollout server arrives as it was sent; what does not fit is refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rollouts import Filters, Prompt, Rollout, Sampling, wire
from rollouts.picture_tokens import PictureTokens
from rollouts.vllm_compat import EngineSettings
from rollouts.wire import broken

WHOLE = Rollout([5, 6], [-0.1, -1e-17], "naïve \x00 <b>", "stop", 3)


def pictures():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (7, 5, 4), dtype=np.uint8)
    return [Image.fromarray(noise[..., :3]), Image.fromarray(noise), Image.fromarray(noise[..., 0])]


def test_prompts_arrive_as_they_were():
    """Pictures to the pixel, in three modes; what the trainer's processor made of them stays behind."""
    pixels = {"pixel_values": torch.zeros(1, 3)}
    prompts = [
        Prompt("a", [1, 2], tuple(pictures()), pixels, seed=2**40),
        Prompt("b\u2028", [3]),
        Prompt("c", [4], (pictures()[0],)),
    ]
    sampling = Sampling(9, temperature=0.7, seed=4, filters=Filters(top_p=0.9, top_k=5), stop=("done", "."))
    message, tensors = wire.unpack(wire.pack_question(prompts, 8, sampling, "me-3"))
    found = wire.unpack_prompts(message, tensors)
    assert found == [replace(prompt, model_inputs={}) for prompt in prompts]
    assert [image.mode for image in found[0].images] == ["RGB", "RGBA", "L"]
    assert (wire.sampling_of(message["sampling"]), message["group_size"], message["weights"]) == (sampling, 8, "me-3")


@pytest.mark.parametrize("around", [None, (7, 8)])
def test_a_setup_arrives_as_it_was(around, tmp_path):
    files = {"config.json": b"{}", "chat/template.jinja": "\u00e9".encode()}
    settings = EngineSettings("bfloat16", 77, enforce_eager=True)
    setup = wire.Setup(files, [1, 2], [9], ["a.weight"], PictureTokens(9, around), settings)
    assert wire.unpack_setup(wire.pack_setup(setup)) == setup
    assert wire.pack_setup(setup) == wire.pack_setup(replace(setup, files=dict(reversed(files.items()))))
    wire.write_files(tmp_path, files)
    assert wire.files_of(tmp_path) == files


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
@pytest.mark.fault(
    fault="hostile: paths in a server's setup",
    injected="`../x` and absolute names",
    expected="refused",
)
def test_files_stay_in_their_folder(name, tmp_path):
    with pytest.raises(ValueError, match="not the name of a file within a folder"):
        wire.write_files(tmp_path / "folder", {name: b"x"})
    assert not list(tmp_path.rglob("outside"))


def body(*contents):
    text = b"".join(wire.length_of(content) + content for content in contents)
    return io.BytesIO(text), len(text)


def test_frames_come_one_by_one():
    assert list(wire.frames(*body(b"one", b"", b"three"))) == [b"one", b"", b"three"]


@pytest.mark.parametrize(
    ("stream", "size", "error"),
    [
        (io.BytesIO(body(b"one", b"two")[0].getvalue()[:-1]), 22, ConnectionError),
        (io.BytesIO((2**60).to_bytes(8, "little")), 8, ValueError),
    ],
    ids=["cut short", "longer than the request"],
)
@pytest.mark.fault(
    fault="server: torn requests",
    injected="a frame cut short, or longer than its request",
    expected="an error, no wait",
)
def test_frames_that_do_not_end(stream, size, error):
    with pytest.raises(error):
        list(wire.frames(stream, size))


def test_weights_in_files(tmp_path, monkeypatch):
    """Views, tied and transposed tensors, in files of a limited size, of which none holds more than it must."""
    monkeypatch.setattr(wire, "SHARD", 100)
    base = torch.arange(40.0).view(5, 8)
    weights = {"a": base, "b": base[1:], "c": base.T, "tied": base, "half": base.bfloat16(), "one": torch.tensor(1.0)}
    paths = wire.write_shards(tmp_path, weights.items())
    loaded = {name: tensor for path in paths for name, tensor in wire.load(path.read_bytes()).items()}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert len(paths) == 5


def test_groups_are_told_whole():
    prompts = [Prompt("a", [1]), Prompt("b", [1], seed=1)]
    rollouts = [replace(WHOLE, token_ids=[n, n]) for n in range(4)]
    told = [wire.group_told(place, prompts[place], rollouts[2 * place :][:2]) for place in (1, 0)]
    found = [wire.group_of(group, prompts, 2, lambda rollout: None) for group in told]
    assert found == [(1, rollouts[2:]), (0, rollouts[:2])]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"token_ids": []}, "a completion of 0 tokens"),
        ({"token_ids": [5, 5, 5]}, "a completion of 3 tokens"),
        ({"log_probs": [-0.1]}, "1 log-probabilities for 2 tokens"),
        ({"token_ids": [5, 7]}, "the token 7, which the model cannot write"),
        ({"token_ids": [-1, 5]}, "the token -1, which the model cannot write"),
        ({"finish_reason": "abort"}, "the finish reason 'abort'"),
        ({"weight_version": 2}, "weights of version 2, not 3"),
    ],
)
@pytest.mark.fault(
    fault="server: impossible completions",
    injected="unknown tokens, wrong lengths, stale versions",
    expected="refused with the reason",
)
def test_what_a_completion_cannot_be(changes, fault):
    assert broken(replace(WHOLE, **changes), allowed={5, 6}, most=2, version=3) == fault
