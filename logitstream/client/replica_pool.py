"""The replicas behind the teacher's addresses: found, connected to, chosen from, and let go when they vanish."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence

from logitstream.client.replica import Replica, Request
from logitstream.errors import FingerprintMismatch, LogitstreamError, TeacherUnavailable

logger = logging.getLogger(__name__)


class Fleet:
    """One task a replica; new_replica makes the replica of an address, lost is told what a failed one had in flight."""

    def __init__(
        self,
        new_replica: Callable[[str], Replica],
        lost: Callable[[Replica, list[Request], LogitstreamError], None],
        *,
        any_teacher: bool,
    ) -> None:
        """any_teacher: the replicas that are up at the start decide which teacher the run has."""
        self.changed = asyncio.Event()
        self._new_replica = new_replica
        self._lost = lost
        self._replicas: dict[str, tuple[Replica, asyncio.Task[None]]] = {}
        self.started = False  # nothing is asked for before
        self._any_teacher = any_teacher
        self._unlike: FingerprintMismatch | None = None
        self._resolve_error: TeacherUnavailable | None = None

    @property
    def replicas(self) -> list[Replica]:
        return [replica for replica, _ in self._replicas.values()]

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Connect to new addresses; send nothing more to those that have vanished."""
        for address in addresses:
            if address not in self._replicas:
                replica = self._new_replica(address)
                task = asyncio.ensure_future(replica.run())
                task.add_done_callback(functools.partial(self._ended, address))
                self._replicas[address] = (replica, task)
        for address, (replica, task) in self._replicas.items():
            replica.gone = address not in addresses
            if replica.gone and not replica.in_flight:
                task.cancel()
        self.changed.set()

    def unresolved(self, address: str, error: Exception) -> None:
        """A look-up failed; the replicas known so far are kept."""
        if self._resolve_error is None:
            logger.warning("cannot resolve %s: %s", address, error)
        self._resolve_error = TeacherUnavailable(f"cannot resolve {address}: {error}")

    def choose(self, request: Request) -> Replica | None:
        """The replica that would answer first; not the one that just failed it, if another has room."""
        able = [replica for replica in self.replicas if replica.has_room(request)]
        others = [replica for replica in able if replica is not request.avoid]
        return min(others or able, key=lambda replica: replica.expected_seconds(request.num_tokens), default=None)

    def break_stalled(self, now: float) -> None:
        """Give up connections that answer nothing, if there are others to go to."""
        ready = [replica for replica in self.replicas if replica.state == "ready"]
        stalled = [replica for replica in ready if replica.stalled(now)]
        if len(stalled) < len(ready):
            for replica in stalled:
                replica.break_off("it answers nothing, and others are there")

    def look_at_start(self) -> None:
        """Begin once all replicas that are up have told what they serve, one is ready, and they serve the same.

        Else whoever answers first would decide. Where the caller has named the teacher, and for replicas that come up
        later, one that differs is left alone.
        """
        present = [replica for replica in self.replicas if not replica.gone]
        if self.started or any(replica.state == "connecting" and not replica.last_error for replica in present):
            return
        if self._any_teacher:
            self._unlike = self._unlike or _unlike(present)
        self.started = self._unlike is None and any(replica.state == "ready" for replica in present)

    def hopeless(self) -> LogitstreamError | None:
        """Why nothing will ever be answered: unlike replicas at the start, or all of them serve something else."""
        replicas = self.replicas
        if self._unlike is None and replicas and all(replica.state == "refused" for replica in replicas):
            return replicas[0].last_error
        return self._unlike

    def condition(self) -> str:
        """For error messages: the addresses and the last error seen."""
        errors = [replica.last_error for replica in self.replicas if replica.last_error]
        error = errors[-1] if errors else self._resolve_error
        where = ", ".join(self._replicas) or "no address"
        return f"at {where}; {f'last error: {error}' if error else 'no error seen'}"

    async def close(self) -> None:
        tasks = [task for _, task in self._replicas.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, address: str, task: asyncio.Task[None]) -> None:
        replica, _ = self._replicas.pop(address)
        if not task.cancelled() and (error := task.exception()):  # a bug of ours; the next look-up starts it anew
            logger.error("serving teacher %s failed", address, exc_info=error)
            self._lost(replica, list(replica.in_flight.values()), TeacherUnavailable(f"{address}: {error}"))


def _unlike(replicas: Sequence[Replica]) -> FingerprintMismatch | None:
    """What a replica that is up has against it, beside one that fits: both are named."""
    fits = next((replica.address for replica in replicas if replica.state == "ready"), "")
    for replica in replicas:
        if fits and isinstance(replica.last_error, FingerprintMismatch):
            both = f"the replicas {fits} and {replica.address} differ, where a run has one teacher"
            return FingerprintMismatch(f"{both}: {replica.last_error}")
    return None
