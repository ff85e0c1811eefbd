"""Streams of datasets: shuffled within a window, the same wherever a run goes on, shared by processes."""

import io
import json
import shutil
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import ValidationError

from sail_rl.command_line import BadInput
from sail_rl.config import SftRecipe
from sail_rl.config_data import DataSection, FileSource, HubSource
from sail_rl.data.mixture import open_sources
from sail_rl.data.stream import RowStream, Shard
from sail_rl.launch import counted_in_steps

ROWS, FILES, WINDOW = 60, 3, 8


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def dataset(request, tmp_path_factory):
    """A dataset folder of several files; those of parquet have pictures."""
    folder = tmp_path_factory.mktemp("dataset")
    for file in range(FILES):
        numbers = range(file * ROWS // FILES, (file + 1) * ROWS // FILES)
        rows = [{"id": str(n), "question": f"What is {n}?", "answer": str(n)} for n in numbers]
        if request.param == "parquet":
            pictures = [{"images": [{"bytes": png(n), "path": None}]} for n in numbers]
            table = pyarrow.Table.from_pylist([row | more for row, more in zip(rows, pictures, strict=True)])
            pyarrow.parquet.write_table(table, folder / f"train-{file}.parquet", row_group_size=7)
        else:
            (folder / f"train-{file}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def stream_of(dataset, *, shard=None, shuffle=True, prepare=lambda example, position: example, others=(), weight=None):
    source = HubSource(path=str(dataset), streaming=True, shuffle_buffer=WINDOW, weight=weight)
    rows = open_sources([source, *others], {}, "train", "data.train")
    options = {"seed": 3, "max_bad_rows": 0, "quarantine_file": None, "shard": shard or Shard()}
    return RowStream(rows, prepare, shuffle=shuffle, **options)


def numbers(examples):
    return [int(example.id) for example in examples]


def test_a_pass_has_every_row_once_and_shuffles_neighbours(dataset):
    stream = stream_of(dataset)
    passes = [numbers(stream.next_items(ROWS)) for _ in range(4)]
    everything = [number for one in passes for number in one]
    # A block may hold the end of one pass and the beginning of the next: four passes end together with the blocks.
    blocks = [everything[n : n + WINDOW] for n in range(0, 4 * ROWS, WINDOW)]
    in_order = [n % ROWS for n in range(4 * ROWS)]
    assert [sorted(block) for block in blocks] == [sorted(in_order[n : n + WINDOW]) for n in range(0, 240, WINDOW)]
    assert everything != in_order
    assert passes[0] != passes[1]
    assert numbers(stream_of(dataset, shuffle=False).next_items(2 * ROWS)) == in_order[: 2 * ROWS]


def test_a_stream_goes_on_anywhere_and_gives_pictures(dataset):
    whole = stream_of(dataset).next_items(150)
    for position in (1, 7, 8, 59, 60, 61, 130):
        stream = stream_of(dataset)
        stream.position = position
        assert numbers(stream.next_items(20)) == numbers(whole[position : position + 20]), position
    for example in whole:
        assert example.columns["answer"] == example.id
        assert [image.getpixel((0, 0))[0] for image in example.images] in ([], [int(example.id)])
    assert bool(whole[0].images) == any(dataset.glob("*.parquet"))


def test_processes_share_a_stream(dataset):
    """Each decodes its own rows, and together they have those of one process, in its order."""
    whole, shares = numbers(stream_of(dataset).next_items(24)), []
    for rank in range(2):
        loaded = []
        stream = stream_of(dataset, shard=Shard(rank, 2), prepare=lambda e, _, loaded=loaded: loaded.append(e.id) or e)
        shares.append(numbers(stream.next_items(24)))
        assert len(loaded) == 12
    assert shares[0] + shares[1] == whole


def test_only_a_window_is_in_memory_and_nothing_is_read_before_its_time(dataset):
    stream = stream_of(dataset)
    rows = stream.rows.parts[0].rows
    held = []
    for _ in range(100):
        stream.next_items(1)
        held.append((rows._end - rows._first, rows._end))
    assert max(size for size, _ in held) <= 4 * WINDOW
    assert held[0][1] <= WINDOW
    assert all(later[1] - earlier[1] <= 2 * WINDOW for earlier, later in pairwise(held))
    first = rows.row(2)  # long gone: read again
    assert first["id"] == "2"
    assert rows.row(90)["id"] == "30"


def test_bad_rows_of_a_stream_are_set_aside_and_named(tmp_path):
    rows = [{"id": f"r{n}", "question": "Q", "answer": str(n)} for n in range(3 * WINDOW)]
    rows[5]["question"] = ""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = stream_of(tmp_path / "data")
    stream.max_bad_rows, stream.quarantine_file = 1, tmp_path / "quarantine.jsonl"
    examples = stream.next_items(23)
    assert sorted(int(example.id[1:]) for example in examples) == [n for n in range(24) if n != 5]
    (record,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (record["row"], record["id"]) == (6, "r5")
    with pytest.raises(BadInput, match=r"row 30 \(id r5\)"):
        stream.next_items(23)  # the next pass meets it again


def test_a_stream_in_a_mixture(dataset, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"id": str(n), "question": "Q", "answer": "1"}) for n in range(100, 104)))
    mixed = numbers(stream_of(dataset, weight=3.0, others=[FileSource(path=str(file), weight=1.0)]).next_items(32))
    assert sum(number >= 100 for number in mixed) == 8
    assert sorted(number for number in mixed if number < 100) == list(range(24))


def test_what_a_stream_cannot_be_used_for(dataset, tmp_path):
    stream = {"source": "hub", "path": str(dataset), "streaming": True}
    with pytest.raises(ValidationError, match=r"`data.eval`: a stream has no end here"):
        DataSection.model_validate({"train": "pictures", "eval": stream})
    recipe = {"output_dir": "runs/x", "model": "x", "data": {"train": stream}, "trainer": {"num_train_epochs": 1.0}}
    with pytest.raises(BadInput, match=r"data.train has no end; set trainer.max_steps"):
        counted_in_steps(SftRecipe.model_validate(recipe))
    shutil.copytree(dataset, tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        file.write_text("")
    with pytest.raises(BadInput, match=r"cannot be loaded|no rows in it"):
        stream_of(tmp_path / "a").next_items(1)
