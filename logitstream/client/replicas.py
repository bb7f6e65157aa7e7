"""The teacher's replicas: described before they are asked, chosen from, and given up when they fail."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import random
from collections.abc import Callable, Sequence

from logitstream import metrics
from logitstream.client.replica import Call, Replica, Request, RequestBatch, loop_time
from logitstream.client.teacher_identity import TeacherIdentity, TokenizerMismatch, wire_digest
from logitstream.errors import FingerprintMismatch, LogitstreamError, TeacherUnavailable
from logitstream.rpc.remote_teacher import RemoteTeacher
from logitstream.types import TeacherInfo, call_tokens

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = (0.2, 10.0)
"""First and largest bound of the random wait before a replica that failed is described again."""
REFUSED_SECONDS = 30.0
"""A replica that serves something else is described again this often: it may have been replaced."""


class ReplicaPool:
    """All replicas, and the queue of requests that wait for room at one of them; used from one event loop.

    Each replica that is being brought up has a task.
    """

    def __init__(
        self,
        identity: TeacherIdentity,
        connect: Callable[[str], RemoteTeacher],
        *,
        stalled_seconds: float,
        longest_patience_seconds: float,
    ) -> None:
        self.replicas: dict[str, Replica] = {}
        self.started = False  # nothing is asked for before
        self.progress_at = 0.0
        self._identity = identity
        self._connect = connect
        self._stalled_seconds, self._longest_patience = stalled_seconds, longest_patience_seconds
        self._any_teacher = identity.is_open
        self._unlike: FingerprintMismatch | None = None
        self._resolve_error: TeacherUnavailable | None = None
        self._changed = asyncio.Event()
        self._waiting: list[tuple[float, int, RequestBatch, asyncio.Future[Call]]] = []
        self._order = itertools.count()
        self._closing: set[asyncio.Task[None]] = set()

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Bring up replicas at new addresses; ask nothing more of those that have vanished."""
        for address in addresses:
            if address not in self.replicas:
                replica = self.replicas[address] = Replica(address, progress_at=loop_time())
                replica.starting = asyncio.ensure_future(self._bring_up(replica, wait=False))
        for address in self.replicas.keys() - set(addresses):
            self._retire(self.replicas.pop(address))
        self._update()

    async def wait_started(self) -> TeacherInfo:
        """Wait until requests may be sent. Raises what makes it hopeless."""
        while not self.started or self._identity.info is None:
            if error := self.hopeless():
                raise error
            await self._changed.wait()
        return self._identity.info

    async def acquire(self, batch: RequestBatch, *, expiry: Callable[[], float]) -> Call | None:
        """Wait for a replica with room for some of the requests, the soonest needed first; None: after the expiry."""
        priority = math.inf if batch.suspect else batch.priority
        future: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._order), batch, future))
        self._update()
        try:
            while (seconds := expiry() - loop_time()) > 0 and not future.done():
                await asyncio.wait([future], timeout=seconds)
            return future.result() if future.done() else None
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:
                self.release(future.result())
            raise
        finally:
            future.cancel()

    def answered(self, call: Call, request: Request) -> None:
        """Note that a replica has answered, and how fast."""
        replica, now = call.replica, loop_time()
        replica.slowest_seconds = max(replica.slowest_seconds, now - replica.progress_at)
        replica.silent = 0
        replica.progress_at = self.progress_at = now
        call.answered_tokens = min(call.answered_tokens + request.cost, call.num_tokens)
        taken = (now - call.began) / (call.tokens_ahead + call.answered_tokens)
        replica.seconds_per_token += (0.2 if replica.seconds_per_token else 1.0) * (taken - replica.seconds_per_token)
        self._update()

    def release(self, call: Call) -> None:
        """End a call; its connection is closed if nothing else uses it any more."""
        replica = call.replica
        replica.calls.discard(call)
        if replica.connection is not call.connection and all(
            other.connection is not call.connection for other in replica.calls
        ):
            self._close_soon(call.connection)
        self._update()

    def pause(self, call: Call, seconds: float) -> None:
        """Ask less of a replica that took no more, and nothing before so many seconds."""
        replica = call.replica
        replica.limit = max(replica.in_flight_tokens - call.num_tokens, call.num_tokens // 2, 1)
        replica.paused_until = loop_time() + seconds
        asyncio.get_running_loop().call_later(seconds, self._update)

    def raise_limit(self, call: Call) -> None:
        """Ask more of a replica that has answered a whole call, up to what it allows."""
        replica = call.replica
        assert replica.info is not None
        replica.limit = min(replica.limit + call.num_tokens, replica.info.max_in_flight_tokens)

    def lose(self, call: Call, error: LogitstreamError) -> None:
        """Ask nothing more of a replica over a connection that failed, and bring it up again."""
        replica = call.replica
        if replica.connection is not call.connection:
            return  # another call has noticed it before
        replica.connection = None
        replica.silent += 1
        self._failed(replica, error, "lost")
        if self.replicas.get(replica.address) is replica:
            replica.starting = asyncio.ensure_future(self._bring_up(replica, wait=True))

    async def describe_again(self, call: Call) -> None:
        """Learn which weights a replica serves now. Raises FingerprintMismatch if they must not be used."""
        info = await call.connection.describe()
        self._identity.accept(call.replica.address, info)
        call.replica.info = info

    def hopeless(self) -> LogitstreamError | None:
        """Return why nothing will ever be answered: unlike replicas at the start, or all serve something else."""
        replicas = list(self.replicas.values())
        if self._unlike is None and replicas and all(replica.refused for replica in replicas):
            return replicas[0].error
        return self._unlike

    def condition(self) -> str:
        """Describe the addresses and the last error seen, for error messages."""
        errors = [replica.error for replica in self.replicas.values() if replica.error]
        error = errors[-1] if errors else self._resolve_error
        where = ", ".join(self.replicas) or "no address"
        return f"at {where}; {f'last error: {error}' if error else 'no error seen'}"

    async def close(self) -> None:
        replicas = list(self.replicas.values())
        tasks = [replica.starting for replica in replicas if replica.starting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.connection.close() for replica in replicas if replica.connection))

    async def _bring_up(self, replica: Replica, *, wait: bool) -> None:
        """Connect and describe until the replica can be asked."""
        while True:
            if wait:
                bound = RECONNECT_SECONDS[0] * 2 ** min(replica.silent - 1, 10)
                bound = REFUSED_SECONDS if replica.refused else min(RECONNECT_SECONDS[1], bound)
                await asyncio.sleep(random.uniform(0.05, 1.0) * bound)
            connection: RemoteTeacher | None = None
            try:
                connection = self._connect(replica.address)
                replica.info = await self._describe(replica.address, connection)
                replica.connection, connection = connection, None
                break
            except (OSError, ValueError) as error:  # a token or certificate file that is being replaced
                self._failed(replica, TeacherUnavailable(f"{replica.address}: {error}"), "not reached yet")
            except LogitstreamError as error:
                lasting = not isinstance(error, TeacherUnavailable)
                self._failed(replica, error, "refused" if lasting else "not reached yet")
            finally:
                if connection is not None:
                    await connection.close()
            replica.silent, wait = replica.silent + 1, True
        replica.error, replica.limit = None, replica.info.max_in_flight_tokens
        logger.info("teacher %s ready: %s, %d tokens in flight", replica.address, replica.info.model, replica.limit)
        self._update()

    async def _describe(self, address: str, connection: RemoteTeacher) -> TeacherInfo:
        info, tokenizer = await connection.describe(), self._identity.student.tokenizer
        try:
            self._identity.accept(address, info)
        except TokenizerMismatch as error:
            explained = await tokenizer.explain(connection.describe_tokenizer, info)
            raise FingerprintMismatch(f"{error}; {explained}") from None
        await tokenizer.compare_rules(connection.describe_tokenizer, info)
        return info

    def _failed(self, replica: Replica, error: LogitstreamError, outcome: str) -> None:
        if type(replica.error) is not type(error):  # once for each reason, not for each try
            logger.warning("teacher %s %s: %s", replica.address, outcome, error)
        replica.error = error
        self._identity.left(replica.address)
        self._update()

    def _retire(self, replica: Replica) -> None:
        """Let a replica whose address has vanished finish what it has."""
        if replica.starting is not None:
            replica.starting.cancel()
        connection, replica.connection = replica.connection, None
        self._identity.left(replica.address)
        if connection is not None and not replica.calls:
            self._close_soon(connection)

    def _close_soon(self, connection: RemoteTeacher) -> None:
        task = asyncio.ensure_future(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def unresolved(self, name: str, error: Exception) -> None:
        """Note a look-up that failed; the replicas known so far are kept."""
        if self._resolve_error is None:
            logger.warning("cannot resolve %s: %s", name, error)
        self._resolve_error = TeacherUnavailable(f"cannot resolve {name}: {error}")

    def _update(self) -> None:
        """Begin if all replicas that are up have been described, fail or send what waits, and tell who waits for that.

        Without an expected teacher the replicas that are up at the start must serve the same, or whoever answers first
        would decide. Later, and where the caller has named the teacher, one that differs is left alone.
        """
        replicas = self.replicas.values()
        if not self.started and not any(one.connection is None and one.error is None for one in replicas):
            if self._any_teacher:
                self._unlike = self._unlike or _unlike(list(replicas))
            self.started = self._unlike is None and any(one.connection for one in replicas)
        self._changed.set()
        self._changed.clear()
        error = self.hopeless()
        while self._waiting:
            _, _, batch, future = self._waiting[0]
            call = self._choose(batch) if self.started and not future.done() and error is None else None
            if call is not None:
                future.set_result(call)
            elif error is not None and not future.done():
                future.set_exception(error)
            elif not future.done():
                break
            heapq.heappop(self._waiting)
        metrics.STUDENT_IN_FLIGHT_TOKENS.set(sum(replica.in_flight_tokens for replica in replicas))
        metrics.STUDENT_CREDIT_TOKENS.set(sum(replica.limit for replica in replicas if replica.connection))

    def _choose(self, batch: RequestBatch) -> Call | None:
        """Begin a call at the replica that would answer first; not the one that just failed, if another has room."""
        now = loop_time()
        able: list[tuple[bool, float, Replica, list[Request]]] = []
        for replica in self.replicas.values():
            if replica.connection is None or replica.info is None or now < replica.paused_until:
                continue
            stale = self._identity.is_stale(wire_digest(replica.info))  # one at a time, to see when it has caught up
            if stale and replica is batch.avoid:
                continue
            if admitted := replica.admits(batch.requests, alone=stale or batch.suspect):
                seconds = replica.expected_seconds(call_tokens([one.cost for one in admitted]), now)
                able.append((replica is batch.avoid, seconds, replica, admitted))
        if not able:
            return None
        _, _, replica, admitted = min(able, key=lambda one: one[:2])
        assert replica.connection is not None
        if not replica.calls:
            replica.progress_at = now
        num_tokens = call_tokens([one.cost for one in admitted])
        ahead = replica.in_flight_tokens
        call = Call(replica, replica.connection, admitted, batch.suspect, now, num_tokens, ahead)
        replica.calls.add(call)
        return call

    def give_up_stalled(self) -> None:
        """Give up calls at replicas that answer nothing, if there are others to go to.

        One that was only slow has twice as long next time, up to longest_patience_seconds.
        """
        now, ready = loop_time(), [replica for replica in self.replicas.values() if replica.connection]
        stalled = []
        for replica in ready:
            patience = min(max(self._stalled_seconds, 2 * replica.slowest_seconds), self._longest_patience)
            if replica.calls and now - replica.progress_at > patience:
                stalled.append(replica)
        for replica in stalled if len(stalled) < len(ready) else []:
            replica.slowest_seconds = max(replica.slowest_seconds, now - replica.progress_at)
            for call in replica.calls:
                if call.scope is not None and not call.given_up and not call.scope.expired():
                    call.given_up = True
                    call.scope.reschedule(now)


def _unlike(replicas: Sequence[Replica]) -> FingerprintMismatch | None:
    """Return how a replica that is up differs from one that fits; the error names both."""
    fits = next((replica.address for replica in replicas if replica.connection), "")
    for replica in replicas:
        if fits and isinstance(replica.error, FingerprintMismatch):
            both = f"the replicas {fits} and {replica.address} differ, where a run has one teacher"
            return FingerprintMismatch(f"{both}: {replica.error}")
    return None
