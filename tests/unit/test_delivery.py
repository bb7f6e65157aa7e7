"""Who is blamed when calls break, and how long the next one waits: in virtual time, without a network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from logitstream.client.delivery import Delivery
from logitstream.client.replica import Request, RequestBatch
from logitstream.client.replicas import ReplicaPool
from logitstream.client.teacher_identity import OwnTokenizer, TeacherIdentity
from logitstream.errors import ProtocolViolation, ScoringFailed, TeacherUnavailable
from logitstream.tokenizer import Vocabulary
from logitstream.types import ReceivedTargets, TeacherInfo, TokenSequence
from tests.fake_teacher import FATAL_ID, SPEC, TOKENIZER_DIGEST, VOCAB_SIZE, fake_info


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when it is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def in_virtual_time(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    random.seed(1)
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())


class Teacher:
    """One replica: `breaks` says which sequences end the call that they come in; others are answered in turn."""

    def __init__(self, breaks: Callable[[TokenSequence], bool]) -> None:
        self.breaks = breaks
        self.opened_at: list[float] = []
        self.num_broken = 0

    def connect(self, _address: str) -> Any:
        self.opened_at.append(asyncio.get_running_loop().time())
        return Connection(self)


class Connection:
    """Breaks as a whole: what is in flight when one call breaks is lost with it."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._broken = asyncio.Event()

    async def describe(self) -> TeacherInfo:
        return fake_info()

    async def describe_tokenizer(self) -> Vocabulary:
        raise ProtocolViolation("a fake has none")

    async def score(
        self, sequences: Sequence[TokenSequence], _spec: object, _caller: object, **_options: object
    ) -> AsyncIterator[tuple[int, ReceivedTargets]]:
        for index, sequence in enumerate(sequences):
            await asyncio.sleep(0.01)
            if self._teacher.breaks(sequence) and not self._broken.is_set():
                self._teacher.num_broken += 1
                self._broken.set()
            if self._broken.is_set():
                raise TeacherUnavailable("broken")
            yield index, ReceivedTargets(payload=b"targets")

    async def close(self) -> None: ...


class Client:
    """Delivery to one replica, without the thread and the look-up of names."""

    def __init__(self, teacher: Teacher) -> None:
        identity = TeacherIdentity(SPEC, vocab_size=VOCAB_SIZE, tokenizer=OwnTokenizer(TOKENIZER_DIGEST))
        self.pool = ReplicaPool(identity, teacher.connect, patience_seconds=(60.0, 150.0))
        self.delivery = Delivery(self.pool, identity, deadline_seconds=1e6)
        self.pool.set_addresses(["teacher:1"])

    def submit(self, priority: int, *token_ids: int) -> Future[ReceivedTargets]:
        request = Request(TokenSequence(token_ids=np.array(token_ids, np.int32)), len(token_ids))
        self.delivery.begin(RequestBatch([request], 0, priority))
        return request.future

    async def close(self) -> None:
        await self.delivery.close()
        await self.pool.close()


def test_a_replica_that_breaks_every_connection_is_asked_less_and_less_and_costs_no_sequence() -> None:
    async def scenario() -> None:
        teacher = Teacher(lambda _sequence: True)
        client = Client(teacher)
        futures = [client.submit(number, 1, 2, 3) for number in range(40)]
        await asyncio.sleep(3600)
        waits = np.diff(teacher.opened_at)
        assert np.median(waits[:3]) < 1.0 < 4.0 < np.median(waits[5:])  # bounds 0.4, 0.8, 1.6 s; then 10 s
        assert not [future for future in futures if future.done()]
        teacher.breaks = lambda _sequence: False
        await asyncio.sleep(60)
        assert [future.result(0).payload for future in futures] == [b"targets"] * 40
        await client.close()

    in_virtual_time(scenario)


def test_sequences_that_break_every_connection_are_found_wherever_they_stand_and_alone_at_the_end() -> None:
    async def scenario(fatal: set[int]) -> None:
        teacher = Teacher(lambda sequence: FATAL_ID in sequence.token_ids)
        client = Client(teacher)
        futures = [client.submit(number, 1, FATAL_ID if number in fatal else 2) for number in range(20)]
        await asyncio.sleep(600)
        assert {number for number, future in enumerate(futures) if future.exception(0)} == fatal
        assert all(isinstance(futures[number].exception(0), ScoringFailed) for number in fatal)
        assert teacher.num_broken <= 9 * len(fatal)
        await client.close()

    for fatal in ({0}, {10}, {19}, {0, 1}, {0, 10}, {17, 19}):
        in_virtual_time(lambda fatal=fatal: scenario(fatal))  # type: ignore[misc]


def test_one_fatal_sequence_of_a_batch_sinks_no_other() -> None:
    async def scenario() -> None:
        teacher = Teacher(lambda sequence: FATAL_ID in sequence.token_ids)
        client = Client(teacher)
        requests = [
            Request(TokenSequence(token_ids=np.array([1, FATAL_ID if number == 3 else 2], np.int32)), 2)
            for number in range(8)
        ]
        client.delivery.begin(RequestBatch(requests, 0, 0))
        await asyncio.sleep(600)
        assert [request.future.exception(0) is None for request in requests] == [number != 3 for number in range(8)]
        await client.close()

    in_virtual_time(scenario)


def test_a_request_that_comes_while_the_client_closes_is_cancelled() -> None:
    async def scenario() -> None:
        client = Client(Teacher(lambda _sequence: False))
        await client.close()
        assert client.submit(1, 1, 2).cancelled()

    in_virtual_time(scenario)
