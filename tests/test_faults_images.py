"""Pictures that are broken, huge or hostile: refused with a reason, before they cost memory, a process or a wait."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import EpsImagePlugin, Image

from sail_rl.data.images import BadRow, decode_image
from sail_rl.data.mixture import JoinedRows, Part
from sail_rl.data.sources import JsonLinesRows
from sail_rl.data.stream import RowStream, Shard
from sail_rl.data.workers import Workers

SIDE = 20_000
MOST_MIB = 100  # decoded, the bombs take 400 to 1,600
DECODE = """
import resource, sys
from pathlib import Path
from sail_rl.data.images import BadRow, decode_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        print(name, decode_image(name, Path()).size)
    except BadRow as reason:
        print(reason)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, content):
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side, *more):
    """A black picture with one bit a pixel, whole and valid, and as small as zlib makes it."""
    lines = zlib.compressobj(9)
    row = b"\0" * (side // 8 + 1)
    packed = b"".join(lines.compress(row * 100) for _ in range(side // 100)) + lines.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@cache
def bombs():
    """Files of a few kilobytes that would take hundreds of megabytes."""
    jpeg, gif = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG")), bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", SIDE, SIDE)
    gif[6:10] = struct.pack("<HH", SIDE, SIDE)
    text = zlib.compress(b"\0" * 100_000_000, 9)
    return {
        "a.png": png(SIDE),
        "a.jpg": bytes(jpeg),
        "a.gif": bytes(gif),
        "a.ppm": f"P6 {SIDE} {SIDE} 255\n".encode(),
        "text.png": png(800, chunk(b"zTXt", b"Comment\0\0" + text)),
    }


@pytest.mark.fault(
    fault="image: decompression bombs",
    injected="PNG, JPEG, GIF and PPM of 20,000 x 20,000 pixels; 100 MB of compressed text in a PNG",
    expected="refused before they are decoded; memory grows by less than 100 MiB",
)
def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    for name, content in bombs().items():
        assert len(content) < 400_000
        (tmp_path / name).write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", DECODE, *bombs()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    *reasons, grown = result.stdout.splitlines()
    assert len(reasons) == len(bombs())
    for name, reason in zip(bombs(), reasons, strict=True):
        assert reason.startswith(f"image {name} "), reason
        assert "pixels" in reason or "too large" in reason.lower(), reason
    assert int(grown) < MOST_MIB


def small_files():
    """One of each common kind, with rotation where it can be told."""
    picture, exif = Image.effect_noise((40, 30), 60).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    kinds = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "DDS", "ICO", "TGA"]
    files = [
        encoded(picture, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {})) for kind in kinds
    ]
    return [*files, encoded(picture.convert("I;16"), "PNG"), encoded(picture.convert("CMYK"), "JPEG")]


def hurt(content, chance):
    """A file with some bytes changed, mostly in its head, and perhaps cut off."""
    bytes_ = bytearray(content)
    for _ in range(chance.choice([1, 2, 5, 20])):
        bytes_[chance.randrange(min(len(bytes_), chance.choice([32, 128, 10**6])))] = chance.choice([0, 127, 255, 1])
    return bytes(bytes_[: chance.randrange(1, len(bytes_))] if chance.random() < 0.3 else bytes_)


@pytest.mark.fault(
    fault="image: broken files",
    injected="2,000 files of 12 kinds with changed bytes or cut off",
    expected="a picture or a bad row, nothing else",
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_file_holds_it_is_a_picture_or_a_bad_row():
    chance, files, outcomes = random.Random(0), small_files(), []
    for _ in range(2000):
        try:
            outcomes.append(decode_image(hurt(chance.choice(files), chance), Path()).mode)
        except BadRow as reason:
            outcomes.append(str(reason)[:23])
    assert set(outcomes) >= {"RGB", "image picture cannot be"}


@pytest.mark.fault(
    fault="image: a header that lies",
    injected="a SPIDER picture that says it is one of a stack, at which Pillow's reader stumbles",
    expected="a bad row",
)
def test_what_a_reader_stumbles_at_is_a_bad_row():
    content = bytearray(encoded(Image.new("F", (4, 3)), "SPIDER"))
    content[107] = 127
    with pytest.raises(BadRow, match=r"image picture cannot be read: .*has no attribute"):
        decode_image(bytes(content), Path())


@pytest.mark.fault(
    fault="image: animated",
    injected="GIF, WebP and PNG of three frames",
    expected="the first frame",
)
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_a_moving_picture_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(moving, Path()).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.fault(
    fault="image: an EPS program",
    injected="a PostScript file by the name of a picture",
    expected="refused; Ghostscript is not called",
)
def test_a_picture_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(BadRow, match="an EPS picture is a program"):
        decode_image("a.png", tmp_path)


@pytest.mark.fault(
    fault="hostile: names of pictures",
    injected="/etc/passwd by a path with .., a link and from the root; a pipe, a device, a folder, an address",
    expected="a bad row, at once, without a word of what the file says",
)
def test_a_name_that_leads_elsewhere_is_a_bad_row(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.png")
    up = "../" * len(folder.parts)
    names = [
        f"{up}etc/passwd",
        "/etc/passwd",
        "link.png",
        "pipe.png",
        "/dev/zero",
        "..",
        "http://127.0.0.1:9/a.png",
        "a\0b",
    ]
    for name in names:
        with pytest.raises(BadRow) as caught:
            decode_image(name, folder)
        assert "root:" not in str(caught.value)


def test_pictures_may_lie_outside_the_datas_folder(tmp_path):
    """Many data sets share a folder of pictures; what is read of it are pictures alone."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "a.png")
    for name in ("../a.png", str(tmp_path / "a.png"), "link.png"):
        assert decode_image(name, tmp_path / "data").size == (4, 2)


def name_and_size(example, position):
    return example.id, example.images[0].size


@pytest.mark.fault(
    fault="image: bombs, pipes and broken files among good rows",
    injected="rows that data workers prepare",
    expected="set aside with id and reason; the order of the rest unchanged; no worker ends",
)
def test_workers_outlive_bad_pictures(tmp_path, capfd):
    files = bombs() | {"cut.jpg": encoded(Image.new("RGB", (40, 40)), "JPEG")[:400], "empty.png": b""}
    files["good.png"] = encoded(Image.new("RGB", (8, 8)), "PNG")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    bad = [*(name for name in files if name != "good.png"), "pipe.png"]
    names = [name for one in bad for name in (one, "good.png")]
    rows = [{"id": f"r{n}", "question": "Why?", "answer": "1", "image": name} for n, name in enumerate(names)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quarantine, workers = tmp_path / "quarantine.jsonl", Workers(1)
    keys = {"seed": 0, "shuffle": False, "max_bad_rows": len(bad), "quarantine_file": quarantine, "shard": Shard()}
    stream = RowStream(
        JoinedRows([Part(JsonLinesRows(tmp_path / "rows.jsonl"))]), name_and_size, **keys, workers=workers
    )
    good = [name for name, _ in stream.next_items(len(bad))]
    workers.close()
    assert sorted(good) == sorted(f"r{2 * n + 1}" for n in range(len(bad)))
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {one["id"]: one["reason"].split()[1] for one in records} == {f"r{2 * n}": name for n, name in enumerate(bad)}
    assert "a data worker ended" not in capfd.readouterr().err
