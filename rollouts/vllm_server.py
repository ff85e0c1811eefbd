"""vLLM in processes of its own: servers that the trainer starts, or that run already, on this machine or others.

New weights are written to files once, and every server is sent those, over HTTP or from GPU to GPU; a server that has
died or lost its weights gets them again. Whatever goes wrong is tried again a few times: the server is started anew (or
waited for), given the weights, and the missing groups are asked for anew. A group comes whole, from one request, or not
at all.

Several trainer processes call every function together; the first of them starts servers and pushes weights.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any
from uuid import uuid4

import torch

from rollouts import Finished, Prompt, Rollout, Sampling, unheard, wire
from rollouts.in_thread import in_thread
from rollouts.server_link import Lacking, Link, OwnLink, Refused, ServerFault
from rollouts.vllm_colocate import Received, digest_of_pixels
from rollouts.weight_channel import Sender


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds, and how often they are tried."""

    start: float
    push: float
    request: float
    restarts: int
    """Tries after the first one, in a row."""
    channels: bool = False
    """Send weights through process groups in place of HTTP."""


@dataclass(frozen=True)
class Crew:
    """The trainer's processes."""

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    """The lists of all processes, joined in the order of their ranks."""


@dataclass(frozen=True)
class Fault:
    """What went wrong with which server."""

    server: int
    kind: type[Exception]
    text: str


@dataclass
class Pending:
    """Completions that are being written."""

    prompts: Sequence[Prompt]
    group_size: int
    sampling: Sampling
    finished: Finished
    groups: dict[int, list[Rollout]] = field(default_factory=dict)
    """Whole groups that have come, by the places of their prompts."""
    asked: list[Future[list[Fault]]] = field(default_factory=list)


class ServerEngine:
    """An engine in one or several other processes."""

    def __init__(
        self,
        setup: wire.Setup,
        vocabulary: int,
        urls: Sequence[str],
        folder: Path,
        limits: Limits,
        crew: Crew,
        give_up: type[Exception],
    ):
        self.setup, self.vocabulary, self.limits, self.crew = wire.pack_setup(setup), vocabulary, limits, crew
        self.suppressed = frozenset(setup.suppressed_token_ids)
        self.picture, self.dtype = setup.picture, getattr(torch, setup.settings.dtype)
        self.give_up = give_up
        self.folder = folder
        self.links: list[Link] = [Link(url.rstrip("/")) for url in urls] or [OwnLink(folder, 0)]
        self.started: set[int] = set()  # servers that have the engine
        self.pushed: dict[int, str] = {}  # the weights that a server has
        self.shards: list[Path] = []
        self.channels: dict[int, Sender] = {}
        self.pushes = 0
        self.weight_version: int | None = None
        self.trainer = crew.gather([uuid4().hex])[0]  # other trainers may push to the same servers
        self._until_done(list)

    @property
    def weights(self) -> str:
        """What the newest weights are called among servers."""
        return f"{self.trainer}-{self.pushes}"

    def load_weights(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Write all weights to files, which servers are sent before they write again.

        So whatever is wrong with a server ends a run between two steps, where it can go on from.
        """
        self.weight_version = None
        if self.crew.rank == 0:
            self.shards = wire.write_shards(self.folder / "weights", parameters)
        else:
            for _ in parameters:  # weights that are in parts become whole on all processes or on none
                pass
        self.weight_version, self.pushes = version, self.pushes + 1

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, finished: Finished = unheard
    ) -> list[Rollout]:
        """`group_size` completions of every prompt, groups together, in the order of the prompts."""
        return self.finish(self.begin(prompts, group_size, sampling, finished))

    def begin(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, finished: Finished = unheard
    ) -> Pending:
        """Let servers write, and return at once; nothing else may be asked of the engine until `finish`."""
        if self.weight_version is None:
            raise RuntimeError("the engine lacks weights: a push did not end, or none has come")
        self._until_done(list)
        pending = Pending(prompts, group_size, sampling, finished)
        self._ask(pending)
        return pending

    def finish(self, pending: Pending) -> list[Rollout]:
        """Wait for the completions; what is missing after a fault is asked for again."""
        self._until_done(lambda: self._faults(pending))
        return [rollout for place in range(len(pending.prompts)) for rollout in pending.groups[place]]

    def receive(self, prompt: Prompt) -> Received:
        """Send a prompt as `generate` does, and tell what reached the model."""
        try:
            link = self.links[self._mine()[0]]
            return Received(**link.call("/receive", self.limits.request, wire.pack_prompts([prompt])))
        except ServerFault as fault:
            raise self.give_up(f"rollout server {fault}") from fault

    def digest(self, parts: Sequence[torch.Tensor]) -> str | None:
        """Of pixels in the engine's precision; None of no pictures."""
        return digest_of_pixels(parts, self.dtype)

    def sleep(self) -> None:
        """Nothing: a server's memory is its own."""

    def wake(self) -> None:
        """Nothing, likewise."""

    def close(self) -> None:
        """End the server that was started, and drop the weights' files."""
        for channel in self.channels.values():
            channel.close()
        for link in self.links:
            if isinstance(link, OwnLink):
                link.end()
        if self.crew.rank == 0:
            shutil.rmtree(self.folder / "weights", ignore_errors=True)

    # ---- trying again

    def _until_done(self, work: Callable[[], list[Fault]]) -> None:
        """Get servers ready and work, on all processes, until nothing goes wrong on any."""
        for tries in range(self.limits.restarts + 1):
            faults = self.crew.gather(self._make_ready() if self.crew.rank == 0 else [])
            self._share_addresses()
            faults = faults or self.crew.gather(work())
            if not faults:
                return
            self._forget(faults)
            if tries == self.limits.restarts or any(fault.kind is Refused for fault in faults):
                break
            if self.crew.rank == 0:
                self._announce(faults, tries)
                sleep(2**tries)
        raise self.give_up("\n  ".join(dict.fromkeys(f"rollout server {fault.text}" for fault in faults)))

    def _make_ready(self) -> list[Fault]:
        """Give every server what it lacks, all of them at once."""
        for link in self.links:
            # In this thread, since the kernel ends a server with the thread that started it.
            if isinstance(link, OwnLink) and link.process is None:
                link.start()
        prepared = [in_thread(self._prepare, number) for number in range(len(self.links))]
        return [fault for future in prepared for fault in future.result()]

    def _prepare(self, number: int) -> list[Fault]:
        """Give one server the engine and the newest weights, if it lacks them."""
        link = self.links[number]
        try:
            if number not in self.started:
                link.call("/start", self.limits.start, self.setup, patient=True)
                self.started.add(number)
            if self.weight_version is not None and self.pushed.get(number) != self.weights:
                self.pushed.pop(number, None)
                self._push(number, link, {"version": self.weight_version, "weights": self.weights})
                self.pushed[number] = self.weights
        except ServerFault as fault:
            return [Fault(number, type(fault), str(fault))]
        return []

    def _push(self, number: int, link: Link, message: dict[str, Any]) -> None:
        """The newest weights to one server, in the request's body or beside it."""
        limit = self.limits.push
        if not self.limits.channels:
            link.call("/push", limit, wire.pack(message), self.shards)
            return
        if number not in self.channels:
            self.channels[number] = Sender(link.own_address(limit), limit)
        channel = self.channels[number]
        sending = in_thread(channel.send, self.shards)
        try:
            link.call("/push", limit, wire.pack(message | {"channel": channel.told(self.shards)}))
            sending.result()
        except (ServerFault, RuntimeError) as mistake:
            # With it ends what is being sent; who still waits for the server to join ends at the limit.
            self.channels.pop(number).close()
            raise mistake if isinstance(mistake, ServerFault) else ServerFault(f"{link.url}/push: {mistake}") from None

    def _share_addresses(self) -> None:
        """A server that was started anew has another one."""
        urls = self.crew.gather([[link.url for link in self.links]])[0]
        for link, url in zip(self.links, urls, strict=True):
            link.url = url

    def _forget(self, faults: Sequence[Fault]) -> None:
        """Take nothing for granted of servers at fault; end ours, unless they only lack something."""
        for fault in faults:
            link = self.links[fault.server]
            if isinstance(link, OwnLink) and fault.kind not in (Lacking, Refused):
                link.end()
            self.started.discard(fault.server)
            self.pushed.pop(fault.server, None)
            if channel := self.channels.pop(fault.server, None):
                channel.close()

    def _announce(self, faults: Sequence[Fault], tries: int) -> None:
        for fault in faults:
            own = isinstance(self.links[fault.server], OwnLink) and fault.kind is not Lacking
            cure = "the server is started anew, it gets" if own else "the server gets, once it is there,"
            print(
                f"warning: rollout server {fault.text}\nwarning: try {tries + 1} of {self.limits.restarts}: {cure} the "
                "weights again, and groups that are missing are asked for anew, as a whole",
                file=sys.stderr,
                flush=True,
            )

    # ---- asking

    def _mine(self) -> list[int]:
        """The servers that this process asks: its share of them, or one that it shares."""
        return list(range(len(self.links)))[self.crew.rank :: self.crew.size] or [self.crew.rank % len(self.links)]

    def _ask(self, pending: Pending) -> None:
        """Send the prompts of all groups that have not come, a part of them to each server."""
        missing = [place for place in range(len(pending.prompts)) if place not in pending.groups]
        mine = self._mine()
        share = -(-len(missing) // len(mine))
        parts = [(number, missing[n * share : (n + 1) * share]) for n, number in enumerate(mine)]
        pending.asked = [in_thread(self._ask_one, pending, number, places) for number, places in parts if places]

    def _ask_one(self, pending: Pending, number: int, places: Sequence[int]) -> list[Fault]:
        """Ask one server; of what comes, groups are kept that are whole and right."""
        prompts, link = [pending.prompts[place] for place in places], self.links[number]
        question = wire.pack_question(prompts, pending.group_size, pending.sampling, self.weights)
        is_broken = self._broken_in(pending.sampling)

        def keep(told: Any) -> None:
            place, group = wire.group_of(told, prompts, pending.group_size, is_broken)
            if places[place] in pending.groups:
                raise wire.WrongAnswer("it answers a prompt twice")
            pending.groups[places[place]] = group
            pending.finished(places[place], group)

        try:
            link.call("/generate", self.limits.request, question, each=keep)
            if missing := [place for place in places if place not in pending.groups]:
                raise wire.WrongAnswer(f"it answers {len(places) - len(missing)} of {len(places)} prompts")
        except wire.WrongAnswer as wrong:
            return [Fault(number, type(wrong), f"{link.url}: {wrong}")]
        except ServerFault as fault:
            return [Fault(number, type(fault), str(fault))]
        return []

    def _broken_in(self, sampling: Sampling) -> Callable[[Rollout], str | None]:
        """What a completion cannot be, sampled so with this model; None of one that can be."""
        allowed = set(range(self.vocabulary)) - self.suppressed
        return partial(wire.broken, allowed=allowed, most=sampling.max_completion_length, version=self.weight_version)

    def _faults(self, pending: Pending) -> list[Fault]:
        """Wait for what was asked, asking first if nothing is under way."""
        if not pending.asked:
            self._ask(pending)
        faults = [fault for future in pending.asked for fault in future.result()]
        pending.asked = []
        return faults
