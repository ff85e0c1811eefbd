"""Checkpoints on the disk: which of them are whole, which is the newest and which the best. Imports no torch.

checkpoints/step_N         complete: named so once everything is on the disk, and a `manifest.json` lists its files
checkpoints/latest, best   links to the newest, and to that of the highest accuracy on data.eval
checkpoints/step_N.broken  one that had been changed since, set aside by a run that could not go on from it
checkpoints/.step_N.tmp    being written or removed; nobody reads it, and the next start clears it away
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sail_rl.run_folder import installed, write_json

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest and of what it lists
AT_ONCE = 1 << 22  # bytes that are read at once
READERS = 4  # files that are read at once; the checksum lets go of the interpreter


# ---- one folder


def temporary_name(target: Path) -> Path:
    """Where a folder is while it is being written or removed."""
    return target.with_name(f".{target.name}.tmp")


def begin_folder(target: Path) -> Path:
    """An empty folder beside the target, to be written."""
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def complete_folder(target: Path, facts: Mapping[str, Any]) -> None:
    """Bring what was written to the disk, list it with some facts in the manifest, and give it its name."""
    temporary = temporary_name(target)
    files = files_of(temporary)
    with ThreadPoolExecutor(READERS) as threads:
        listed = dict(zip(files, threads.map(to_disk, files.values()), strict=True))
    versions = {package: installed(package) for package in ("sail-rl", "torch", "transformers")}
    manifest = {"format": FORMAT, "versions": versions, **facts, "files": listed}
    write_manifest(temporary, manifest)
    for path in (temporary / MANIFEST, *(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        flush(path)
    os.rename(temporary, target)
    flush(target.parent)


def files_of(folder: Path) -> dict[str, Path]:
    """The files in a folder and its folders by their names in the manifest, which is none of them."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST}


def to_disk(path: Path) -> dict[str, Any]:
    """Flush a file; what the manifest says of it."""
    flush(path)
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the disk now."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def checksum(path: Path) -> str:
    """CRC-32 of a file, as eight digits. It guards against a failing disk, not against an attacker."""
    found, buffer = 0, bytearray(AT_ONCE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(memoryview(buffer)[:count], found)
    return f"{found:08x}"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest with a checksum of its own."""
    write_json(folder / MANIFEST, manifest | {"crc32": checksum_of(manifest)})


def checksum_of(manifest: dict[str, Any]) -> str:
    """Of the values, however the file is laid out."""
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; empty where there is nothing that can be relied on."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        told = manifest.pop("crc32")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    return manifest if told == checksum_of(manifest) else {}


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by the name of the file; None if it is whole."""
    manifest = read_manifest(folder)
    if not manifest:
        return f"{MANIFEST} is missing or has been changed"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} is of format {manifest.get('format')!r}; this version reads {FORMAT}"
    files, listed = files_of(folder), manifest["files"]
    with ThreadPoolExecutor(READERS) as threads:
        faults = list(threads.map(lambda name: file_fault(files.get(name), listed[name]), listed))
    named = [f"{name} {fault}" for name, fault in zip(listed, faults, strict=True) if fault]
    return named[0] if named else None


def file_fault(path: Path | None, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with one file."""
    if path is None:
        return "is missing"
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size:,} bytes instead of {expected['bytes']:,}"
        return None if checksum(path) == expected["crc32"] else "has been changed since it was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


# ---- all of a run's


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `checkpoints`, oldest first."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones, which are set aside if there is one."""
    clear_temporary(folder)
    checkpoints, faults = list_checkpoints(folder), dict[str, str]()
    for number, checkpoint in reversed(list(enumerate(checkpoints))):
        print(f"checking {checkpoint}", flush=True)
        fault = fault_of(checkpoint)
        if fault is None:
            link_newest_and_best(folder, checkpoints[: number + 1])
            for broken in checkpoints[number + 1 :]:
                set_aside(broken)
            return checkpoint, faults
        faults[checkpoint.name] = fault
        print(f"warning: {checkpoint} is broken: its {fault}", flush=True)
    return None, faults


def clear_temporary(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for left in folder.glob(".*.tmp"):
        left.unlink() if left.is_symlink() else shutil.rmtree(left)


def set_aside(broken: Path) -> None:
    """Rename a broken checkpoint, so that it neither counts nor stands in the way of a new one of its step."""
    aside = broken.with_name(f"{broken.name}.broken")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(broken, aside)
    print(f"  it is now {aside}", flush=True)


def keep_newest(folder: Path, count: int) -> None:
    """Keep the newest checkpoints, so many, and the best; links first, so that none ever leads nowhere."""
    checkpoints = list_checkpoints(folder)
    best = link_newest_and_best(folder, checkpoints)
    for old in checkpoints[:-count]:
        if old != best:
            # Renamed first: what has its name is complete.
            os.rename(old, temporary_name(old))
            shutil.rmtree(temporary_name(old))


def link_newest_and_best(folder: Path, checkpoints: list[Path]) -> Path | None:
    """Have the links lead to the right ones; the best, if accuracy was measured at any."""
    link(folder / "latest", checkpoints[-1])
    measured = [(read_manifest(one).get("accuracy"), one) for one in checkpoints]
    known = [(accuracy, one) for accuracy, one in measured if accuracy is not None]
    if not known:
        (folder / "best").unlink(missing_ok=True)
        return None
    best = max(known, key=lambda pair: pair[0])[1]  # the first of equals
    link(folder / "best", best)
    return best


def link(path: Path, target: Path) -> None:
    """A relative link in the place of an older one, which leads somewhere until the moment when the new one does."""
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, path)


def note_accuracy(checkpoint: Path, accuracy: float) -> None:
    """Add to a checkpoint what was measured after it was written."""
    write_manifest(checkpoint, read_manifest(checkpoint) | {"accuracy": accuracy})
