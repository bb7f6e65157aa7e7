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
from logitstream.client.replica import Call, Replica, RequestBatch, loop_time
from logitstream.client.teacher_identity import TeacherIdentity, TokenizerMismatch
from logitstream.errors import FingerprintMismatch, LogitstreamError, TeacherUnavailable, TooManyInFlight
from logitstream.rpc.remote_teacher import RemoteTeacher
from logitstream.types import TeacherInfo, call_tokens

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = (0.2, 10.0)
"""First and largest bound of the random wait before a replica that failed is described again."""
REFUSED_SECONDS = 30.0
"""A replica that serves something else is described again this often: it may have been replaced."""


class ReplicaPool:
    """All replicas, and the queue of batches that wait for room at one of them; used from one event loop."""

    def __init__(
        self,
        identity: TeacherIdentity,
        connect: Callable[[str], RemoteTeacher],
        *,
        patience_seconds: tuple[float, float],
    ) -> None:
        """patience_seconds: how long a replica may answer nothing while others are ready, at first and at most."""
        self.replicas: dict[str, Replica] = {}
        self.started = False  # nothing is asked for before
        self.progress_at = 0.0
        self._identity = identity
        self._connect = connect
        self._patience = patience_seconds
        self._unlike: FingerprintMismatch | None = None
        self._resolve_error: Exception | None = None
        self._changed = asyncio.Event()
        self._waiting: list[tuple[float, int, RequestBatch, asyncio.Future[Call]]] = []
        self._order = itertools.count()
        self._closing: set[asyncio.Task[None]] = set()

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Bring up replicas at new addresses; ask nothing more of those that have vanished."""
        for address in addresses:
            if address not in self.replicas:
                replica = self.replicas[address] = Replica(address, loop_time(), self._patience[0])
                replica.starting = asyncio.ensure_future(self._bring_up(replica, wait=False))
        for address in self.replicas.keys() - set(addresses):
            replica = self.replicas.pop(address)
            if replica.starting is not None:
                replica.starting.cancel()
            self._identity.left(address)
            connection, replica.connection = replica.connection, None
            self._close_unused(replica, connection)
        self._update()

    def unresolved(self, name: str, error: Exception) -> None:
        """Note a look-up that failed; the replicas known so far are kept."""
        if self._resolve_error is None:
            logger.warning("cannot resolve %s: %s", name, error)
        self._resolve_error = TeacherUnavailable(f"cannot resolve {name}: {error}")

    async def wait_started(self) -> TeacherInfo:
        """Wait until requests may be sent; raise the error that means they never will be."""
        while not self.started or self._identity.info is None:
            if (dead_end := self._dead_end()) is not None:
                raise dead_end
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
        except asyncio.CancelledError as cancelled:
            if future.done() and future.exception() is None:
                self.finish(future.result(), cancelled)
            raise
        finally:
            future.cancel()

    def answered(self, call: Call) -> None:
        """Note that a replica answers."""
        call.replica.silent = 0
        call.replica.progress_at = self.progress_at = loop_time()

    def finish(self, call: Call, error: BaseException | None) -> None:
        """End a call, and learn from it how much to ask of its replica, and when."""
        replica, now = call.replica, loop_time()
        replica.calls.discard(call)
        if error is None and replica.info is not None:
            replica.limit = min(replica.limit + call.num_tokens, replica.info.max_in_flight_tokens)
            taken = (now - call.began) / (call.tokens_ahead + call.num_tokens)
            known = replica.seconds_per_token
            replica.seconds_per_token = 0.8 * known + 0.2 * taken if known else taken
        elif isinstance(error, TooManyInFlight):
            replica.limit = max(replica.in_flight_tokens, call.num_tokens // 2)
            replica.paused_until = now + error.retry_after_seconds
            asyncio.get_running_loop().call_later(error.retry_after_seconds, self._update)
        elif isinstance(error, LogitstreamError) and replica.connection is call.connection:
            replica.connection = None
            replica.silent += 1
            self._failed(replica, error, "lost")
            replica.starting = asyncio.ensure_future(self._bring_up(replica, wait=True))
        self._close_unused(replica, call.connection)
        self._update()

    def give_up_stalled(self) -> None:
        """Give up calls at replicas that answer nothing for too long, if there are others to go to.

        One that was only slow has twice as long next time, up to a bound.
        """
        now, ready = loop_time(), [replica for replica in self.replicas.values() if replica.connection]
        stalled = [replica for replica in ready if replica.calls and now - replica.progress_at > replica.patience]
        for replica in stalled if len(stalled) < len(ready) else []:
            replica.patience = min(2 * replica.patience, max(self._patience))
            for call in replica.calls:
                if call.scope is not None and not call.scope.expired():
                    call.scope.reschedule(now)

    def condition(self) -> str:
        """Describe the addresses and the last error seen, for error messages."""
        errors = [replica.error for replica in self.replicas.values() if replica.error]
        error = errors[-1] if errors else self._resolve_error
        where = ", ".join(self.replicas) or "no address"
        return f"at {where}; {f'last error: {error}' if error else 'no error seen'}"

    async def close(self) -> None:
        tasks = [replica.starting for replica in self.replicas.values() if replica.starting]
        self.set_addresses([])
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)

    async def _bring_up(self, replica: Replica, *, wait: bool) -> None:
        """Connect and describe until the replica can be asked."""
        while True:
            if wait:
                bound = min(RECONNECT_SECONDS[1], RECONNECT_SECONDS[0] * 2 ** min(replica.silent - 1, 10))
                await asyncio.sleep(random.uniform(0.05, 1.0) * (REFUSED_SECONDS if replica.refused else bound))
            connection: RemoteTeacher | None = None
            try:
                connection = self._connect(replica.address)
                replica.info = await self._describe(replica.address, connection)
                replica.connection, replica.error = connection, None
                break
            except LogitstreamError as error:
                self._failed(replica, error, "not reached yet" if isinstance(error, TeacherUnavailable) else "refused")
            except Exception as error:  # OSError or ValueError: a token or certificate file that is being replaced
                self._failed(replica, TeacherUnavailable(f"{replica.address}: {error!r}"), "not reached yet")
            finally:
                if connection is not None and replica.connection is not connection:
                    await connection.close()
            replica.silent, wait = replica.silent + 1, True
        replica.limit = replica.info.max_in_flight_tokens
        logger.info("teacher %s ready: %s, %d tokens in flight", replica.address, replica.info.model, replica.limit)
        self._update()

    async def _describe(self, address: str, connection: RemoteTeacher) -> TeacherInfo:
        info, tokenizer = await connection.describe(), self._identity.tokenizer
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

    def _close_unused(self, replica: Replica, connection: RemoteTeacher | None) -> None:
        """Close a connection if the replica has another one, or none, and no call uses it any more."""
        used = {replica.connection, *(call.connection for call in replica.calls)}
        if connection is not None and connection not in used:
            task = asyncio.ensure_future(connection.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _dead_end(self) -> LogitstreamError | None:
        """Return why nothing can be asked for, if that will not change by itself."""
        replicas = list(self.replicas.values())
        return self._unlike or (replicas[0].error if replicas and all(one.refused for one in replicas) else None)

    def _update(self) -> None:
        """Begin if all replicas that are up have been described, and send or fail the batches that wait."""
        if not self.started:
            self._start()
        dead_end = self._dead_end()
        self._changed.set()
        self._changed.clear()
        while self._waiting:
            _, _, batch, future = self._waiting[0]
            if not future.done():
                if dead_end is not None:
                    future.set_exception(dead_end)
                elif self.started and (call := self._choose(batch)) is not None:
                    future.set_result(call)
                else:
                    break
            heapq.heappop(self._waiting)
        replicas = self.replicas.values()
        metrics.STUDENT_IN_FLIGHT_TOKENS.set(sum(replica.in_flight_tokens for replica in replicas))
        metrics.STUDENT_CREDIT_TOKENS.set(sum(replica.limit for replica in replicas if replica.connection))

    def _start(self) -> None:
        """Begin once all replicas that are up have been described.

        Without an expected teacher they must all serve the same, or whoever answers first would decide. Later, and if
        the caller has named the teacher, one that differs is left alone.
        """
        replicas = list(self.replicas.values())
        if any(replica.connection is None and replica.error is None for replica in replicas):
            return
        ready = [replica.address for replica in replicas if replica.connection]
        unlike = [replica for replica in replicas if isinstance(replica.error, FingerprintMismatch)]
        if ready and unlike and not self._identity.is_named:
            both = f"the replicas {ready[0]} and {unlike[0].address} differ, where a run has one teacher"
            self._unlike = FingerprintMismatch(f"{both}: {unlike[0].error}")
        self.started = bool(ready) and self._unlike is None

    def _choose(self, batch: RequestBatch) -> Call | None:
        """Begin a call at the replica that would answer first; not the one that just failed, if another has room."""
        now = loop_time()
        best: tuple[bool, float] | None = None
        call: Call | None = None
        for replica in self.replicas.values():
            if replica.connection is None or replica.info is None or now < replica.paused_until:
                continue
            avoided = replica is batch.avoid
            stale = self._identity.is_stale(replica.info.short_weights_digest)  # alone, to see when it has caught up
            admitted = replica.admits(batch.requests, alone=stale or batch.suspect)
            if not admitted or (stale and avoided):
                continue
            num_tokens = call_tokens([request.cost for request in admitted])
            rank = avoided, replica.expected_seconds(num_tokens, now)
            if best is None or rank < best:
                best, ahead = rank, replica.in_flight_tokens
                call = Call(replica, replica.connection, admitted, batch.suspect, num_tokens, ahead, now)
        if call is not None:
            if not call.replica.calls:
                call.replica.progress_at = now
            call.replica.calls.add(call)
        return call
