"""Videos: the frames wanted, exactly, from every container; one tile each in the prompt; through both trainers."""

import json
import math
import re
import wave

import av
import numpy as np
import pytest
from conftest import SMALL_GRPO, command
from PIL import Image

from sail_rl.command_line import BadInput
from sail_rl.data import videos
from sail_rl.data.example import make_example
from sail_rl.data.images import BadRow
from sail_rl.data.prompting import make_prompt
from sail_rl.data.videos import check_video, decode_video, sampled_places
from sail_rl.model.tiny import IMAGE_SIZE, TOKENS_PER_TILE, tiny_processor

FRAMES = 101
B_FRAMES = {"codec": "libx264", "max_b_frames": 3, "gop_size": 24}


def write_video(path, frames=FRAMES, size=(64, 48), codec="mpeg4", pixels="yuv420p", **keys):
    """A film that brightens evenly from black to white, its left half always black."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        for key, value in keys.items():
            setattr(stream.codec_context, key, value)
        for number in range(frames):
            pixels_HW3 = np.zeros((size[1], size[0], 3), np.uint8)
            pixels_HW3[:, size[0] // 2 :] = number * 255 // max(frames - 1, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers(frames, total=FRAMES):
    """Which frames these are, told by their brightness."""
    return [frame.getpixel((frame.width * 3 // 4, frame.height // 2))[0] * (total - 1) / 255 for frame in frames]


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [
        (1, 16, [0]),
        (4, 4, [0, 1, 2, 3]),
        (3, 16, [0, 1, 2]),
        (100, 1, [50]),
        (100, 4, [12, 37, 62, 87]),
        (5, 2, [1, 3]),
    ],
)
def test_places_are_spread_evenly(total, count, places):
    assert sampled_places(total, count) == places


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("a.mp4", {}),
        ("a.mp4", B_FRAMES),
        ("a.mp4", B_FRAMES | {"gop_size": 1000}),
        ("a.mkv", B_FRAMES),
        ("a.ts", B_FRAMES),
        ("a.avi", {"gop_size": 5}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.mov", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    ],
)
@pytest.mark.parametrize("count", [1, 4, 60])
def test_the_frames_wanted_are_decoded_from_every_container(tmp_path, name, keys, count):
    write_video(tmp_path / name, **keys)
    frames = decode_video(name, tmp_path, count)
    assert numbers(frames) == pytest.approx(sampled_places(FRAMES, count), abs=3)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}
    assert [frame.tobytes() for frame in decode_video(name, tmp_path, count)] == [frame.tobytes() for frame in frames]


def test_forms_of_a_video(tmp_path):
    content = write_video(tmp_path / "a.mp4").read_bytes()
    expected = [frame.tobytes() for frame in decode_video("a.mp4", tmp_path, 3)]
    for video in (content, {"bytes": content, "path": "b.mp4"}, {"bytes": None, "path": "a.mp4"}):
        assert [frame.tobytes() for frame in decode_video(video, tmp_path, 3)] == expected
    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(10)]
    pictures[2].save(tmp_path / "2.png")
    given = [*pictures[:2], "2.png", *pictures[3:]]
    assert [frame.getpixel((0, 0))[0] for frame in decode_video(given, tmp_path, 2)] == [2, 7]


def test_a_gif_is_on_white_where_it_is_transparent(tmp_path):
    frames = [Image.new("RGBA", (20, 20), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (0, 0, 5 + number, 20))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    decoded = decode_video("a.gif", tmp_path, 16)
    assert [frame.getpixel((5, 0)) for frame in decoded] == [(255, 255, 255), (255, 0, 0), (255, 0, 0)]
    assert [frame.getpixel((15, 0)) for frame in decoded] == [(255, 255, 255)] * 3


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_film_of_a_turned_camera_is_upright(tmp_path, degrees):
    content = write_video(tmp_path / "a.mp4").read_bytes()
    cos, sin = (round(part(math.radians(degrees))) for part in (math.cos, math.sin))
    straight, turned = ((1, 0, 0, 1), (cos, sin, -sin, cos))
    track = content.index(b"tkhd")
    old, new = (matrix_bytes(*matrix) for matrix in (straight, turned))
    (tmp_path / "turned.mp4").write_bytes(content[:track] + content[track:].replace(old, new, 1))
    first, upright = (decode_video(name, tmp_path, 1)[0] for name in ("a.mp4", "turned.mp4"))
    assert upright.tobytes() == first.rotate(-degrees, expand=True).tobytes()
    assert upright.size == ((48, 64) if degrees != 180 else (64, 48))


def matrix_bytes(a, b, c, d):
    """A track's display matrix, 16.16 and 2.30 fixed point."""
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return b"".join(value.to_bytes(4, "big", signed=True) for value in values)


def test_large_frames_are_kept_small(tmp_path):
    write_video(tmp_path / "a.mp4", frames=2, size=(1920, 1080))
    assert [frame.size for frame in decode_video("a.mp4", tmp_path, 16)] == [(768, 432)] * 2
    assert decode_video([Image.new("RGB", (100, 1536))], tmp_path, 1)[0].size == (50, 768)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ("no.mp4", "video no.mp4 cannot be read: No such file"),
        ("empty.mp4", "video empty.mp4 cannot be read: Invalid data"),
        ("cut.mp4", "video cut.mp4 cannot be read: Invalid data"),
        ("hurt.mkv", "video hurt.mkv "),
        ("raw.264", "video raw.264 has frames without times; write it anew"),
        ("sound.wav", "video sound.wav has no pictures, only sound or text"),
        (b"no film", "video (bytes) cannot be read: Invalid data"),
        (["no.png"], "image no.png cannot be read"),
        ([], "an empty list of frames"),
        (5, "a video is a path, bytes or a list of pictures, not int"),
    ],
)
@pytest.mark.fault(
    fault="data: broken videos",
    injected="noise, empty and torn files",
    expected="BadRow with the reason",
)
def test_a_video_that_cannot_be_used_says_why(tmp_path, video, reason):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(write_video(tmp_path / "a.mp4").read_bytes()[:2000])
    content = bytearray(write_video(tmp_path / "a.mkv", **B_FRAMES).read_bytes())
    content[len(content) // 3 : len(content) // 3 + 800] = b"\x55" * 800
    (tmp_path / "hurt.mkv").write_bytes(content)
    write_video(tmp_path / "raw.264", codec="libx264")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(1600))
    with pytest.raises(BadRow, match=re.escape(reason)):
        decode_video(video, tmp_path, 4)


@pytest.mark.fault(
    fault="data: an endless video",
    injected="a film beyond the limit",
    expected="refused without reading it",
)
def test_a_film_that_is_too_long_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "MAX_FRAMES", 100)
    write_video(tmp_path / "a.mp4")
    with pytest.raises(BadRow, match=r"video a.mp4 has more than 100 frames; cut it, or give some frames as a list"):
        decode_video("a.mp4", tmp_path, 4)


def test_what_is_checked_before_the_first_step(tmp_path):
    write_video(tmp_path / "a.mp4")
    check_video("a.mp4", tmp_path)
    check_video(b"looked at later", tmp_path)
    for video, reason in (("no.mp4", "there is no file"), ({"path": "no.mp4"}, "there is no file"), (5, "not int")):
        with pytest.raises(BadRow, match=reason):
            check_video(video, tmp_path)


# In prompts.


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(["What moves? Frame1: Frame2: user assistant"] * 3, max_tiles=12)


def example_of(folder, **row):
    return make_example({"answer": "1"} | row, "row 1", {}, folder, video_frames=2)


def test_frames_stand_where_the_video_stood(tmp_path, processor):
    write_video(tmp_path / "a.mp4")
    wide = Image.new("RGB", (2 * IMAGE_SIZE, IMAGE_SIZE), "red")
    row = {"question": "<image>Here? <video>\nWhat moves?", "videos": ["a.mp4"], "images": [wide]}
    example = example_of(tmp_path, **row)
    assert (example.question, example.columns["videos"]) == ("Here? What moves?", [str(tmp_path / "a.mp4")])
    assert [frame.size for frame in example.videos[0]] == [(64, 48)] * 2
    prompt = make_prompt(example, processor, "direct", 999)
    one, three = ("<img>" + "<IMG_CONTEXT>" * TOKENS_PER_TILE * tiles + "</img>\n" for tiles in (1, 3))
    expected = f"<|im_start|>user\n{three}Here? Frame1: {one}Frame2: {one}What moves?<|im_end|><|im_start|>assistant\n"
    assert processor.tokenizer.decode(prompt.token_ids) == expected
    assert [image.size for image in prompt.images] == [wide.size, (IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE)]
    assert len(prompt.model_inputs["pixel_values"]) == 3 + 2
    # An engine that cuts tiles by itself gets the same prompt from the pictures.
    again = processor(
        text=[expected.replace(three, "<IMG_CONTEXT>\n").replace(one, "<IMG_CONTEXT>\n")], images=[*prompt.images]
    )
    assert again["input_ids"][0] == prompt.token_ids


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"question": "Why?", "video": "a.mp4"}, ["video", "text"]),
        ({"question": "Why?", "videos": "a.mp4"}, ["video", "text"]),
        ({"question": "Why?", "video": ["a.png", "a.png"]}, ["video", "text"]),
        ({"question": "Why?", "videos": ["a.mp4", ["a.png"]], "image": "a.png"}, ["image", "video", "video", "text"]),
        ({"question": "A<video>B<video>", "videos": ["a.mp4", "a.mp4"]}, ["text", "video", "text", "video"]),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}], "video": "a.mp4"}, ["video"]),
    ],
)
def test_forms_of_the_column(tmp_path, processor, row, kinds):
    write_video(tmp_path / "a.mp4", frames=3)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    example = example_of(tmp_path, **row)
    assert [part["type"] for part in example.messages[0]["content"]] == kinds
    assert len(example.videos) == kinds.count("video")
    images = [*example.images, *(frame for video in example.videos for frame in video)]
    assert len(make_prompt(example, processor, "direct", 999).images) == len(images)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "<video>"}, "0 videos but 1 video placeholders"),
        ({"question": "<video> and <video>", "videos": ["a.mp4"]}, "1 videos but 2 video placeholders"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
            "a part of type 'audio'; text, image and video",
        ),
    ],
)
def test_rows_whose_videos_and_places_differ(tmp_path, row, reason):
    write_video(tmp_path / "a.mp4", frames=3)
    with pytest.raises(BadRow, match=reason):
        example_of(tmp_path, **row)


def test_a_frame_cannot_be_several_tiles(tmp_path):
    processor = tiny_processor(["What moves?"] * 3, max_tiles=4)
    processor.image_processor.min_patches = 2
    example = example_of(tmp_path, question="Why?", video=[Image.new("RGB", (4, 4))])
    with pytest.raises(BadInput, match=r"model\.min_tiles = 2: a frame of a video is one tile; set model\.min_tiles=1"):
        make_prompt(example, processor, "direct", 999)


# Through the trainers.

REWARD = """
from pathlib import Path

def seen(completions, videos, images, **columns):
    assert all(Path(path).is_file() for row in [*videos, *images] for path in row)
    return [float(len(row)) for row in images]
"""


def test_both_trainers_learn_from_videos(tmp_path):
    """Two steps each, with the judge form; the format reward checks the form that data.thinking asks for."""
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", frames=10 + number)
    rows = [
        {"question": "<video>How bright?", "videos": [f"{number}.mp4"], "answer": str(number), "reasoning": "It grows.",
         "judgement": "It must be watched.", "needs_thinking": number > 0}
        for number in range(3)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(REWARD)
    data = [f"data.train={file}", f"data.eval={file}", "data.thinking=judge", "data.video_frames=3"]
    steps = ["trainer.max_steps=2", "trainer.eval_every=null"]
    sft = command(
        "sail_rl/train_sft.py", "recipes/quickstart_sft.yaml", *data, *steps, "data.reasoning=terse",
        "sft.samples_per_step=2", f"output_dir={tmp_path / 'sft'}",
    )  # fmt: skip
    assert sft.returncode == 0, sft.stderr
    small = [override for override in SMALL_GRPO if not override.startswith("data.")]
    rewards = f"rewards=[{{function: format}}, {{function: '{tmp_path / 'mine.py'}:seen'}}]"
    grpo = command(
        "sail_rl/train_grpo.py", "recipes/quickstart.yaml", *small, *data, *steps, rewards,
        f"model={tmp_path / 'sft/final'}", f"output_dir={tmp_path / 'grpo'}",
    )  # fmt: skip
    assert grpo.returncode == 0, grpo.stderr
    records = [json.loads(line) for line in (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()]
    assert [record["rewards/seen/mean"] for record in records] == [3.0, 3.0]
    shown = [json.loads(line) for line in (tmp_path / "grpo/transcripts/step_000001.jsonl").read_text().splitlines()]
    assert all(len(row["images"]) == 3 and (tmp_path / "grpo" / row["images"][0]).is_file() for row in shown)
    assert (tmp_path / "grpo/report.html").is_file()
