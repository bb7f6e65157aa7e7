"""The service's calls: protobuf is decoded and encoded here, and nothing deeper sees a message.

A request's way: 1 interceptor (token) -> 2 `one_request` (read, parse) -> 3 `TeacherServicer.score` (check, admit) ->
4 `Scheduler.submit` (fair queue) -> 5 `Scheduler.run` (batch) -> 6 backend thread -> 7 encoder thread -> 8 the call's
list of finished futures, from which `score` writes what is ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TypeVar

import grpc

from logitstream import metrics
from logitstream.errors import (
    FingerprintMismatch,
    InvalidSequence,
    NonFiniteLogits,
    ProtocolViolation,
    RequestError,
    ScoringFailed,
    ServerDraining,
)
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.tokenizer import Vocabulary
from logitstream.types import TargetSpec, TeacherInfo, credit_tokens, entries_bound
from teacher_server.access import caller
from teacher_server.admission import Admission
from teacher_server.backend import ScoreRequest
from teacher_server.calls import SERVICE, Context, one_request
from teacher_server.config import LimitSettings
from teacher_server.scheduler import SLICE, Scheduler, Scored

MAX_CLIENT_ID_CHARS = 128
MAX_CALL_SEQUENCES = 8192
TOKENIZER_PART_BYTES = 32 << 10
"""Size of a message of `DescribeTokenizer`, below the least that max_message_bytes may be."""
RESULTS_BYTES = 1 << 20
"""Targets that share a message, at most: they count no more against the client that does not read them."""
ENTRIES_PER_MESSAGE_BYTE = 4
"""Sequences whose targets could not fit into a message even at two bits an entry are refused before they are scored."""

SEND_SECONDS = metrics.TEACHER_STAGE_SECONDS.labels("send")

LENGTH_DELIMITED = 2
RESULT_TAG = bytes([pb.ScoreResults.RESULTS_FIELD_NUMBER << 3 | LENGTH_DELIMITED])
TARGETS_TAG = bytes([pb.ScoreResult.TARGETS_FIELD_NUMBER << 3 | LENGTH_DELIMITED])

T = TypeVar("T")
Ready = tuple[int, int, Scored | RequestError]
"""Index, cost and outcome of a sequence whose result is not sent yet."""

log = logging.getLogger(__name__)


class TeacherServicer:
    """Describe, DescribeTokenizer and Score of one scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        admission: Admission,
        limits: LimitSettings,
        *,
        id_model: bytes = b"",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """vocabulary: for students whose tokenizer differs; None: they are told the digests alone."""
        self._scheduler = scheduler
        self._admission = admission
        self._limits = limits
        self._id_model = id_model
        self._vocabulary = vocabulary.to_bytes() if vocabulary is not None else b""
        self._tokenizer_rules = vocabulary.rules_digest if vocabulary is not None else ""
        self.handler = grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": one_request(pb.DescribeRequest, self.describe),
                "DescribeTokenizer": one_request(pb.DescribeTokenizerRequest, self.describe_tokenizer),
                "Score": one_request(pb.ScoreRequest, self.score),
            },
        )

    async def describe(self, _request: pb.DescribeRequest, context: Context) -> None:
        info = described(self._scheduler.info, self._limits, self._id_model, self._tokenizer_rules)
        await context.write(convert.info_to_message(info))

    async def describe_tokenizer(self, _request: pb.DescribeTokenizerRequest, context: Context) -> None:
        if not self._vocabulary:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not tell its vocabulary")
        for start in range(0, len(self._vocabulary), TOKENIZER_PART_BYTES):
            await context.write(pb.TokenizerPart(data=self._vocabulary[start : start + TOKENIZER_PART_BYTES]))

    async def score(self, call: pb.ScoreRequest, context: Context) -> None:
        """Write each sequence's result when it is ready; when the call ends, however it ends, drop what is left."""
        spec, vocab_size = self._check(call), self._scheduler.info.vocab_size
        requests: list[tuple[int, int, ScoreRequest]] = []
        ready: deque[Ready] = deque()
        async for index, one in _in_turns(list(enumerate(call.sequences))):
            try:
                request = self._request(one, spec, call.draw_set)
                requests.append((index, credit_tokens(request.sequence, spec, vocab_size), request))
            except RequestError as error:
                ready.append((index, 0, error))
        waiting: dict[asyncio.Future[Scored], tuple[int, int]] = {}
        finished: list[asyncio.Future[Scored]] = []
        has_finished = asyncio.Event()

        def finish(future: asyncio.Future[Scored]) -> None:
            finished.append(future)
            has_finished.set()

        client_id = caller.get() or call.client_id
        with self._admission.hold(client_id, [cost for _, cost, _ in requests]) as release:
            try:
                await self._scheduler.open_stored(spec)
                async for index, cost, request in _in_turns(requests):
                    try:
                        future = self._scheduler.submit(request, client_id=client_id, priority=call.priority)
                    except RequestError as error:
                        ready.append((index, cost, error))
                        continue
                    waiting[future] = index, cost
                    future.add_done_callback(finish)
                while ready or waiting:
                    if not ready and not finished:
                        has_finished.clear()
                        await has_finished.wait()
                    ready.extend((*waiting.pop(future), _outcome(future)) for future in finished)
                    finished.clear()
                    message = results_message(ready, min(RESULTS_BYTES, self._limits.max_message_bytes), call, release)
                    start = time.perf_counter()
                    await context.write(message)  # waits while the client reads too slowly
                    SEND_SECONDS.observe(time.perf_counter() - start)
            finally:
                for future in waiting:
                    future.cancel()

    def _request(self, one: pb.Sequence, spec: TargetSpec, draw_set: int) -> ScoreRequest:
        vocab_size, limits = self._scheduler.info.vocab_size, self._limits
        sequence = convert.sequence_from_message(
            one, vocab_size=vocab_size, max_sequence_tokens=limits.max_sequence_tokens
        )
        most = ENTRIES_PER_MESSAGE_BYTE * limits.max_message_bytes
        if (entries := entries_bound(sequence, spec, vocab_size)) > most:
            raise InvalidSequence(
                f"{len(sequence)} tokens may give {entries} entries: the limit is {most}; "
                "ask for shorter sequences or fewer entries a row"
            )
        return ScoreRequest(sequence=sequence, spec=spec, draw_set=draw_set)

    def _check(self, call: pb.ScoreRequest) -> TargetSpec:
        """Compare what the call expects with what is served. Raises the error that ends the call."""
        info = self._scheduler.info
        if self._scheduler.is_draining:
            raise ServerDraining("the server is draining: ask another replica")
        if len(call.client_id) > MAX_CLIENT_ID_CHARS or not call.client_id.isprintable():
            raise ProtocolViolation(f"client_id must be at most {MAX_CLIENT_ID_CHARS} printable characters")
        if len(call.sequences) > MAX_CALL_SEQUENCES:
            raise ProtocolViolation(f"{len(call.sequences)} sequences in a call: the limit is {MAX_CALL_SEQUENCES}")
        if call.vocab_size < info.vocab_size:
            raise FingerprintMismatch(
                f"the student's vocabulary of {call.vocab_size} is smaller than the teacher's {info.vocab_size}; "
                "if only padding differs, start teacher-server with model.vocab_size as the student has"
            )
        if call.tokenizer_digest and call.tokenizer_digest != info.tokenizer_digest:
            raise FingerprintMismatch(
                f"the student's tokenizer {call.tokenizer_digest[:64]} is not the teacher's "
                f"{info.tokenizer_digest}, whose tokens DescribeTokenizer tells"
            )
        _check_weights(call.weights_digest, info.weights_digest)
        return convert.spec_from_message(call.spec)


def described(info: TeacherInfo, limits: LimitSettings, id_model: bytes, tokenizer_rules: str) -> TeacherInfo:
    """Return what `Describe` tells of a backend behind this server's limits."""
    return replace(
        info,
        max_sequence_tokens=limits.max_sequence_tokens,
        max_in_flight_tokens=limits.max_in_flight_tokens,
        max_message_bytes=limits.max_message_bytes,
        id_model=id_model,
        tokenizer_rules=tokenizer_rules,
        server_version=version("logitstream"),
    )


def results_message(
    ready: deque[Ready], room: int, call: pb.ScoreRequest, release: Callable[[int], None] = lambda _cost: None
) -> bytes:
    """Take results that fit into `room` bytes, at least one, and serialize them as a ScoreResults.

    Targets are framed here and copied once: protobuf would copy them into a message and out again, for twenty times
    the time (https://protobuf.dev/programming-guides/encoding).
    """
    parts: list[bytes] = []
    payload_bytes = 0
    for _ in range(min(len(ready), SLICE)):
        index, cost, outcome = ready[0]
        if isinstance(outcome, RequestError):
            _note_refusal(index, outcome)
            head = pb.ScoreResult(index=index, error=convert.error_to_message(outcome)).SerializeToString()
            parts += RESULT_TAG, varint(len(head)), head
        else:
            targets, digest = outcome.payload, bytes.fromhex(outcome.weights_digest)[: convert.WIRE_DIGEST_BYTES]
            if payload_bytes and payload_bytes + len(targets) > room:
                break
            _check_weights(call.weights_digest, outcome.weights_digest)
            payload_bytes += len(targets)
            rest = pb.ScoreResult(index=index, teacher_version=outcome.teacher_version, weights_digest=digest)
            head = rest.SerializeToString() + TARGETS_TAG + varint(len(targets))
            parts += RESULT_TAG, varint(len(head) + len(targets)), head, targets
            metrics.TEACHER_SEQUENCES.inc()
        ready.popleft()
        if cost:
            release(cost)
    metrics.TEACHER_PAYLOAD_BYTES.inc(payload_bytes)
    return b"".join(parts)


def varint(number: int) -> bytes:
    """Encode a length as protobuf does: seven bits a byte, least significant first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(0x80 | number & 0x7F)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _note_refusal(index: int, refusal: RequestError) -> None:
    name = type(refusal).__name__
    metrics.TEACHER_REJECTS.labels(name).inc()
    level = logging.WARNING if isinstance(refusal, ScoringFailed | NonFiniteLogits) else logging.DEBUG
    log.log(level, "sequence %d of client %r refused, %s: %s", index, caller.get(), name, refusal)


async def _in_turns(items: Sequence[T]) -> AsyncIterator[T]:
    """Yield the items, and give others their turn on the event loop after each SLICE."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % SLICE == 0:
            await asyncio.sleep(0)


def _outcome(future: asyncio.Future[Scored]) -> Scored | RequestError:
    error = future.exception()
    if error is not None and not isinstance(error, RequestError):
        raise error
    return error or future.result()


def _check_weights(expected: str, served: str) -> None:
    if expected and expected != served:
        raise FingerprintMismatch(f"the student wants weights {expected[:64]}, this server serves {served}")
