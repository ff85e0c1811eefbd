"""From a recipe entry to a function: a built-in name, or `path/file.py:name`."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards import BUILT_IN
from rewards.call import RewardError, describe
from rewards.judge import Judge
from rewards.remote import Remote


@dataclass(frozen=True, eq=False)
class Reward:
    """A reward function with its place in the mix."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The recipe entry's own keys, passed on at every call."""
    remote: Remote | None = None
    """The process that the function is called in, when not in this one."""
    at_once: bool = False
    """Whether it is called once for all completions of a step, in the trainer's own thread."""

    def close(self) -> None:
        """End the process of the function."""
        if self.remote:
            self.remote.close()

    @property
    def asks_judge(self) -> bool:
        """Whether the function was given the recipe's judge."""
        return "judge" in self.arguments

    @property
    def is_rule(self) -> bool:
        """Whether it is called early and for every completion: others build on its values, and few are for a judge."""
        return not self.asks_judge or "judge_texts" in self.arguments


def load_reward(
    function: str,
    name: str,
    weight: float,
    arguments: Mapping[str, Any],
    timeout: float | None = None,
    in_process: bool = False,
    judge: Judge | None = None,
) -> Reward:
    """Find the function and check that it takes the entry's keys; raises RewardError.

    A function with an argument `judge` is given the recipe's judge (accuracy, where its key `judge_texts` is true).
    Any other of a user's is called in a process of its own, whose CPU time `timeout` bounds, unless it is `in_process`.
    """
    found = load_from_file(function) if ":" in function else load_built_in(function)
    check_arguments(function, found, arguments)
    asks = asked_for_judge(found, arguments)
    if asks and judge is None:
        raise RewardError(f"reward {function!r} asks a judge: name one in the section judge (base_url and model)")
    asks_judge = asks is not None and judge is not None
    apart = ":" in function and not in_process and not asks_judge
    if timeout and not apart:
        why = "one that asks a judge has the judge's limits" if asks_judge else "it bounds functions of your own"
        why = "in_process: true has no process to end" if in_process else why
        raise RewardError(f"reward {function!r}: timeout = {timeout:g} cannot be kept: {why}; leave one of them out")
    given = {**arguments, "judge": judge} if asks_judge else arguments
    return Reward(name, found, weight, given, Remote(function, timeout) if apart else None, at_once=in_process)


def asked_for_judge(function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool | None:
    """Whether a function needs the judge (True), takes one where the recipe has it (False), or does not (None)."""
    taken = inspect.signature(function).parameters
    if "judge" not in taken or ("judge_texts" in taken and not arguments.get("judge_texts")):
        return None
    return "judge_texts" in taken or taken["judge"].default is inspect.Parameter.empty


def find_reward(function: str) -> None:
    """Whether the built-in or the file exists, without running the file; raises RewardError."""
    if ":" in function:
        reward_file(function)
    else:
        load_built_in(function)


def reward_file(function: str) -> Path:
    """The file of `path/file.py:name`."""
    file = Path(function.rpartition(":")[0])
    if not file.is_file():
        raise RewardError(f"reward {function!r}: there is no file {file.resolve()}")
    return file


def load_built_in(name: str) -> Callable[..., Any]:
    """One of the rewards of this package."""
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RewardError(
            f"reward {name!r}: no such built-in; {hint}built in are {', '.join(BUILT_IN)}; "
            "your own is named path/file.py:name"
        )
    return BUILT_IN[name]


def load_from_file(function: str) -> Callable[..., Any]:
    """`path/file.py:name`, the path relative to where the run is started."""
    file, name = reward_file(function), function.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward {function!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way while it is imported
        raise RewardError(f"reward {function!r}: {file} fails to import: {describe(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise RewardError(f"reward {function!r}: {file} has no function {name!r}; it has: {', '.join(functions)}")
    return found


def check_arguments(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """A recipe key that the function does not name is a misspelt key, not a data column."""
    known = list(inspect.signature(function).parameters)
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, ["function", "weight", "timeout", "in_process", *known], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RewardError(f"reward {name!r}: unknown key {key!r}{hint} (the function's own: {', '.join(known)})")
