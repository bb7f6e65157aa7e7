"""Who is blamed when connections break, and how long the next one waits: in virtual time, without a network."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from logitstream.client.dispatcher import DeliverySettings, Dispatcher
from logitstream.client.own_tokenizer import OwnTokenizer
from logitstream.client.replica import Request
from logitstream.client.teacher_identity import Identity, KnownTeacher
from logitstream.errors import ProtocolViolation, ScoringFailed, TeacherUnavailable
from logitstream.rpc.connection import Answer, Outgoing
from logitstream.tokenizer import Vocabulary
from logitstream.types import TeacherInfo, TokenSequence
from tests.fake_teacher import FATAL_ID, SPEC, TOKENIZER_DIGEST, VOCAB_SIZE, fake_info

IDENTITY = Identity(client_id="test", vocab_size=VOCAB_SIZE, tokenizer=OwnTokenizer(TOKENIZER_DIGEST), spec=SPEC)


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
    """One replica: `breaks` says which requests end the connection that they come over; others are answered in turn."""

    def __init__(self, breaks: Callable[[Outgoing], bool]) -> None:
        self.breaks = breaks
        self.opened_at: list[float] = []
        self.num_broken = 0

    def connect(self, _address: str) -> Any:
        return Connection(self)


class Connection:
    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._requests: asyncio.Queue[Outgoing] = asyncio.Queue()

    async def describe(self) -> TeacherInfo:
        return fake_info()

    async def describe_tokenizer(self) -> Vocabulary:
        raise ProtocolViolation("a fake has none")

    async def open(self, _spec: object, **_fields: object) -> int:
        self._teacher.opened_at.append(asyncio.get_running_loop().time())
        return 65536

    async def send(self, requests: Sequence[Outgoing]) -> None:
        for request in requests:
            self._requests.put_nowait(request)

    async def cancel(self, _request_ids: Sequence[int]) -> None: ...

    async def events(self) -> AsyncIterator[Answer]:
        while True:
            request = await self._requests.get()
            if self._teacher.breaks(request):
                self._teacher.num_broken += 1
                raise TeacherUnavailable("broken")
            yield Answer(request_id=request.request_id, payload=b"targets")

    async def close(self) -> None: ...


def dispatcher_of(teacher: Teacher) -> Dispatcher:
    dispatcher = Dispatcher(
        identity=IDENTITY, teacher=KnownTeacher(IDENTITY), settings=DeliverySettings(), connect=teacher.connect
    )
    dispatcher.fleet.set_addresses(["teacher:1"])
    return dispatcher


def submit(dispatcher: Dispatcher, request_id: int, *token_ids: int) -> Request:
    request = Request(
        request_id=request_id,
        sequence=TokenSequence(token_ids=np.array(token_ids, np.int32)),
        draw_set=0,
        priority=request_id,
        deadline=time.monotonic() + 300.0,
    )
    dispatcher.submit(request)
    return request


def test_a_replica_that_breaks_every_connection_is_asked_less_and_less_and_costs_no_sequence() -> None:
    async def scenario() -> None:
        teacher = Teacher(lambda _request: True)
        dispatcher = dispatcher_of(teacher)
        requests = [submit(dispatcher, number, 1, 2, 3) for number in range(40)]
        await asyncio.sleep(3600)
        waits = np.diff(teacher.opened_at)
        assert np.median(waits[:3]) < 1.0 < 4.0 < np.median(waits[5:])  # bounds 0.4, 0.8, 1.6 s; then 10 s
        assert not [request for request in requests if request.future.done()]
        teacher.breaks = lambda _request: False
        await asyncio.sleep(60)
        assert [request.future.result(0).payload for request in requests] == [b"targets"] * 40
        await dispatcher.close()

    in_virtual_time(scenario)


def test_sequences_that_break_every_connection_are_found_wherever_they_stand_and_alone_at_the_end() -> None:
    async def scenario(fatal: set[int]) -> None:
        teacher = Teacher(lambda request: FATAL_ID in request.sequence.token_ids)
        dispatcher = dispatcher_of(teacher)
        requests = [submit(dispatcher, number, 1, FATAL_ID if number in fatal else 2) for number in range(20)]
        await asyncio.sleep(600)
        failed = {request.request_id for request in requests if request.future.exception(0)}
        assert failed == fatal
        assert all(isinstance(requests[number].future.exception(0), ScoringFailed) for number in fatal)
        assert teacher.num_broken <= 9 * len(fatal)
        await dispatcher.close()

    for fatal in ({0}, {10}, {19}, {0, 1}, {0, 10}, {17, 19}):
        in_virtual_time(lambda fatal=fatal: scenario(fatal))  # type: ignore[misc]


def test_a_request_that_comes_while_the_client_closes_is_cancelled() -> None:
    async def scenario() -> None:
        dispatcher = dispatcher_of(Teacher(lambda _request: False))
        await dispatcher.close()
        assert submit(dispatcher, 1, 1, 2).future.cancelled()

    in_virtual_time(scenario)
