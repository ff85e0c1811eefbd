"""Finished checkpoints copied to a repository of the Hugging Face Hub, in the background, while training goes on.

The Hub gets the model alone: optimizer and progress stay in output_dir. A copy that fails costs the run nothing, since
the next checkpoint, and last the final model, is sent in its place.
"""

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from sail_rl.command_line import BadInput
from sail_rl.launch import Run

NOT_SENT = ("trainer_state.pt", "deepspeed", "manifest.json")
ADAPTERS = "adapter_*"  # files of peft, which would turn a whole model beside them into a base that is missing


class HubCopy:
    """A run's repository on the Hub; nothing happens where the recipe names none."""

    def __init__(self, run: Run):
        self.repository = run.recipe.trainer.push_to_hub if run.is_main else None
        self.sending: threading.Thread | None = None
        self.failed = 0
        """Copies that have failed since this launch."""
        error = make_repository(self.repository) if self.repository else None
        error = run.shard.gather([error])[0]  # every process ends with it, and none waits for another
        if error:
            raise BadInput(error)

    def send(self, checkpoint: Path) -> None:
        """Begin to copy a checkpoint. While an older one is still on its way, a newer one is left to the next save."""
        if not self.repository or (self.sending and self.sending.is_alive()):
            return
        try:
            folder = linked_copy(checkpoint)
        except OSError as error:  # such as a full disk
            self._failed(checkpoint.name, error)
            return
        self.sending = threading.Thread(target=self._send, args=(folder, checkpoint.name), daemon=True)
        self.sending.start()

    def finish(self, final: Path) -> None:
        """Copy the final model, and wait until it is there."""
        if not self.repository:
            return
        if self.sending:
            self.sending.join()
        print(f"copying {final} to {self.repository}", flush=True)
        failed = self.failed
        self._copy(final, "final model")
        if self.failed > failed:
            print(f"WARNING: `hf upload {self.repository} {final}` sends it later", file=sys.stderr, flush=True)

    def _send(self, folder: Path, name: str) -> None:
        self._copy(folder, name)
        shutil.rmtree(folder, ignore_errors=True)

    def _copy(self, folder: Path, name: str) -> None:
        try:
            upload(self.repository, folder, name)
        except Exception as error:  # of the network, the Hub or the disk; the library's errors have no common base
            self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self.failed += 1
        told = f"{name} could not be copied to {self.repository}: {type(error).__name__}: {one_line(error)}"
        print(f"WARNING: {told}", file=sys.stderr, flush=True)


def make_repository(repository: str) -> str | None:
    """Make it, private, unless it exists; what is wrong, so that it is told before training and not after."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
    except Exception as error:  # as above
        return (
            f"trainer.push_to_hub = {repository!r}: the repository can neither be made nor found "
            f"({type(error).__name__}: {one_line(error)}); log in with `hf auth login` or HF_TOKEN, with a token that "
            "may write there, or leave the key out"
        )
    return None


def upload(repository: Any, folder: Path, name: str) -> None:
    """One commit with the files of a model's folder. A LoRA run's checkpoints are adapters and its last model is whole:
    the adapters' files then have to go."""
    from huggingface_hub import HfApi

    outdated = [ADAPTERS] if (folder / "adapter").is_dir() else None
    HfApi().upload_folder(
        repo_id=repository, folder_path=folder, commit_message=f"sail_rl: {name}", delete_patterns=outdated
    )


def one_line(error: Exception) -> str:
    """The beginning of an error's text."""
    return " ".join(str(error).split())[:300]


def linked_copy(checkpoint: Path) -> Path:
    """The same files under another name, which stay when the run drops the checkpoint; they take no room meanwhile.

    The name is one that the next start clears away, should this launch be killed.
    """
    folder = checkpoint.with_name(f".{checkpoint.name}.sending.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder, copy_function=link_or_copy, ignore=shutil.ignore_patterns(*NOT_SENT))
    return folder


def link_or_copy(source: str, target: str) -> None:
    """Files of a checkpoint are never written again, so a second name is enough where the file system has such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
