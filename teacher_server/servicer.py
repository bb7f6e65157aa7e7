"""gRPC and protobuf at the edge: decode, hand on, encode. Nothing deeper sees a message."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

import grpc
from grpc import aio

from logitstream import metrics
from logitstream.errors import (
    FingerprintMismatch,
    InvalidSequence,
    LogitstreamError,
    NonFiniteLogits,
    ProtocolViolation,
    RequestError,
    ScoringFailed,
    ServerDraining,
)
from logitstream.rpc import convert
from logitstream.rpc.status import status_of
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.tokenizer import Vocabulary
from logitstream.types import TargetSpec, TeacherInfo
from teacher_server.access import caller
from teacher_server.admission import Accounts, Admission
from teacher_server.backend import ScoreRequest, cost_in_tokens, entries_bound
from teacher_server.calls import one_request
from teacher_server.first_message import EOF, Context, first_message, parse
from teacher_server.replies import reply_messages
from teacher_server.scheduler import SLICE, Scheduler, Scored
from teacher_server.stream import ClientStream

GONE_SECONDS = 10.0
MAX_CLIENT_ID_CHARS = 128
MAX_MESSAGE_REQUESTS = 8192
TOKENIZER_PART_BYTES = 32 << 10
"""Of one message of `DescribeTokenizer`, below the least that max_message_bytes may be."""
ENTRIES_PER_MESSAGE_BYTE = 4
"""Requests whose targets could not fit into a message even at two bits an entry are refused before they are scored."""

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    max_sequence_tokens: int
    max_in_flight_tokens: int
    max_queue_tokens: int
    max_message_bytes: int
    max_streams: int
    max_client_streams: int


class _ClientGone(LogitstreamError):
    """What is written reaches nobody any more."""


class TeacherServicer:
    """Takes raw bytes, so that what is no message is refused as such and sizes are known before decoding; a stream's
    answers are serialized in `replies.py`."""

    def __init__(
        self,
        scheduler: Scheduler,
        limits: StreamLimits,
        *,
        id_model: bytes = b"",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """vocabulary: for students whose tokenizer differs; None: they are told the digests alone."""
        self._scheduler = scheduler
        self._limits = limits
        self._id_model = id_model
        self._vocabulary = vocabulary.to_bytes() if vocabulary is not None else b""
        self._tokenizer_rules = vocabulary.rules_digest if vocabulary is not None else ""
        self._streams: set[ClientStream] = set()
        self._accounts = Accounts(
            max_in_flight_tokens=limits.max_in_flight_tokens,
            max_queue_tokens=limits.max_queue_tokens,
            max_sequence_tokens=limits.max_sequence_tokens,
            max_streams=limits.max_streams,
            max_client_streams=limits.max_client_streams,
        )
        self._stream_ids = itertools.count(1)
        self.admission = Admission(
            max_in_flight_tokens=limits.max_in_flight_tokens, max_queue_tokens=limits.max_queue_tokens
        )

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What the gRPC server serves."""
        service = pb.DESCRIPTOR.services_by_name["TeacherService"]
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {
                "Describe": one_request(pb.DescribeRequest, self.describe),
                "DescribeTokenizer": one_request(pb.DescribeTokenizerRequest, self.describe_tokenizer),
                "StreamTargets": grpc.stream_stream_rpc_method_handler(self.stream_targets),
                "Score": one_request(pb.ScoreRequest, self.score),
            },
        )

    @property
    def info(self) -> TeacherInfo:
        """What is served now, with this server's limits."""
        return described(self._scheduler.info, self._limits, self._id_model, self._tokenizer_rules)

    @property
    def num_unsent(self) -> int:
        """Requests whose answers have not been written yet."""
        return self.admission.num_calls + sum(stream.num_unsent for stream in self._streams)

    def announce_drain(self, grace_seconds: float) -> None:
        for stream in self._streams:
            stream.announce_drain(grace_seconds)

    async def describe(self, _request: pb.DescribeRequest, context: Context) -> None:
        await context.write(convert.info_to_message(self.info))

    async def describe_tokenizer(self, _request: pb.DescribeTokenizerRequest, context: Context) -> None:
        if not self._vocabulary:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not tell its vocabulary")
        for start in range(0, len(self._vocabulary), TOKENIZER_PART_BYTES):
            await context.write(pb.TokenizerPart(data=self._vocabulary[start : start + TOKENIZER_PART_BYTES]))

    async def score(self, message: pb.ScoreRequest, context: Context) -> None:
        """Answer each sequence of a call when it is ready. Cancellation, for whatever reason, drops what is left."""
        spec = self._check_open(message)
        client_id = _client(message)
        requests, refused = await self._parse(message, spec)
        costs = [cost_in_tokens(request, self._scheduler.info.vocab_size) for _, request in requests]
        finished: asyncio.Queue[asyncio.Future[Scored]] = asyncio.Queue()
        submitted: dict[asyncio.Future[Scored], tuple[int, int]] = {}
        with self.admission.hold(client_id, costs) as hold:
            try:
                await self._scheduler.open_stored(spec)
                async for (index, request), cost in _in_turns(list(zip(requests, costs, strict=True))):
                    try:
                        future = self._scheduler.submit(request, client_id=client_id, priority=message.priority)
                    except RequestError as error:
                        refused.append((index, error))
                        continue
                    submitted[future] = index, cost
                    future.add_done_callback(finished.put_nowait)
                for index, refusal in refused:
                    await self._send_result(context, index, refusal)
                for _ in range(len(submitted)):
                    future = await finished.get()
                    index, cost = submitted.pop(future)
                    hold.release(cost)
                    outcome = _outcome(future)
                    if isinstance(outcome, Scored):
                        _check_weights(message.weights_digest, outcome.weights_digest)
                    await self._send_result(context, index, outcome)
            finally:
                for future in submitted:
                    future.cancel()

    async def _parse(
        self, message: pb.ScoreRequest, spec: TargetSpec
    ) -> tuple[list[tuple[int, ScoreRequest]], list[tuple[int, RequestError]]]:
        """Return a call's sequences, by their index, and what is wrong with others. Raises ProtocolViolation."""
        vocab_size = self._scheduler.info.vocab_size
        max_entries = ENTRIES_PER_MESSAGE_BYTE * self._limits.max_message_bytes
        if len(message.sequences) > MAX_MESSAGE_REQUESTS:
            raise ProtocolViolation(
                f"{len(message.sequences)} sequences in a call: the limit is {MAX_MESSAGE_REQUESTS}"
            )
        requests, refused = [], []
        async for index, one in _in_turns(list(enumerate(message.sequences))):
            try:
                sequence = convert.sequence_from_message(
                    one, vocab_size=vocab_size, max_sequence_tokens=self._limits.max_sequence_tokens
                )
                request = ScoreRequest(sequence=sequence, spec=spec, draw_set=message.draw_set)
                if (entries := entries_bound(request, vocab_size)) > max_entries:
                    raise InvalidSequence(
                        f"{len(sequence)} tokens may give {entries} entries: the limit is {max_entries}; "
                        "ask for shorter sequences or fewer entries a row"
                    )
            except RequestError as error:
                refused.append((index, error))
            else:
                requests.append((index, request))
        return requests, refused

    async def _send_result(self, context: Context, index: int, outcome: Scored | RequestError) -> None:
        if isinstance(outcome, RequestError):
            name = type(outcome).__name__
            metrics.TEACHER_REJECTS.labels(name).inc()
            level = logging.WARNING if isinstance(outcome, ScoringFailed | NonFiniteLogits) else logging.DEBUG
            log.log(level, "sequence refused, %s: %s", name, outcome, extra={"client": caller.get(), "request": index})
        else:
            metrics.TEACHER_SEQUENCES.inc()
            metrics.TEACHER_PAYLOAD_BYTES.inc(len(outcome.payload))
        start = time.perf_counter()
        await context.write(result_message(index, outcome))
        metrics.TEACHER_STAGE_SECONDS.labels("send").observe(time.perf_counter() - start)

    async def stream_targets(self, _requests: object, context: Context) -> None:
        """One stream from `open` to the last answer; a client that goes away cancels this coroutine."""
        try:
            message = await self._read_open(context)
            spec = self._check_open(message)
            with self._stream(_client(message), spec) as stream:  # before anything is awaited: it counts at once
                await self._scheduler.open_stored(spec)
                await self._serve(stream, message, context)
        except LogitstreamError as error:
            await _abort(context, error)
        except BaseExceptionGroup as group:
            await _abort(context, _expected(group))

    async def _serve(self, stream: ClientStream, opened: pb.Open, context: Context) -> None:
        opening = pb.StreamTargetsResponse(opened=pb.Opened(max_in_flight_tokens=self._accounts.credit))
        await _write(context, opening.SerializeToString())
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(self._receive(stream, context))
            await self._send(stream, opened.weights_digest, context)
            receiving.cancel()

    async def _read_open(self, context: Context) -> pb.Open:
        message = await first_message(context, pb.StreamTargetsRequest, name="`open` message")
        if message.WhichOneof("kind") != "open":
            raise ProtocolViolation(f"expected `open` as the first message, got {message.WhichOneof('kind')}")
        opened: pb.Open = message.open
        return opened

    def _check_open(self, message: pb.Open | pb.ScoreRequest) -> TargetSpec:
        """The handshake; raises FingerprintMismatch, InvalidSpec, ProtocolViolation or TooManyInFlight."""
        info = self._scheduler.info
        client_id = _client(message)
        if self._scheduler.is_draining:
            raise ServerDraining("the server is draining: ask another replica")
        if len(client_id) > MAX_CLIENT_ID_CHARS or not client_id.isprintable():
            raise ProtocolViolation(f"client_id must be at most {MAX_CLIENT_ID_CHARS} printable characters")
        if isinstance(message, pb.Open):
            self._accounts.check_streams(client_id)
        if message.vocab_size < info.vocab_size:
            raise FingerprintMismatch(
                f"the student's vocabulary of {message.vocab_size} is smaller than the teacher's {info.vocab_size}; "
                "where only padding differs, start teacher-server with vocab_size as the student has"
            )
        if message.tokenizer_digest and message.tokenizer_digest != info.tokenizer_digest:
            raise FingerprintMismatch(
                f"the student's tokenizer {message.tokenizer_digest[:64]} is not the teacher's "
                f"{info.tokenizer_digest}, whose tokens DescribeTokenizer tells"
            )
        _check_weights(message.weights_digest, info.weights_digest)
        return convert.spec_from_message(message.spec)

    @contextmanager
    def _stream(self, client_id: str, spec: TargetSpec) -> Iterator[ClientStream]:
        before = self._accounts.credit
        account = self._accounts.open(client_id)
        stream = ClientStream(
            self._scheduler,
            spec,
            accounts=self._accounts,
            account=account,
            stream_id=next(self._stream_ids),
            max_entries=ENTRIES_PER_MESSAGE_BYTE * self._limits.max_message_bytes,
        )
        self._streams.add(stream)
        self._streams_changed(before)
        log.info("stream opened", extra={"stream": stream.stream_id, "client": client_id})
        try:
            yield stream
        finally:
            stream.close()
            before = self._accounts.credit
            self._accounts.close(account)
            self._streams.discard(stream)
            self._streams_changed(before)
            log.info("stream closed", extra={"stream": stream.stream_id, "client": client_id})

    def _streams_changed(self, credit_before: int) -> None:
        metrics.TEACHER_CLIENTS.set(len(self._streams))
        credit = self._accounts.credit
        if credit != credit_before:
            for stream in self._streams:
                stream.offer_credit(credit)

    async def _receive(self, stream: ClientStream, context: Context) -> None:
        while (data := await context.read()) is not EOF:
            message = parse(pb.StreamTargetsRequest, data)
            kind = message.WhichOneof("kind")
            if kind == "requests":
                for requests in _slices(message.requests.requests):
                    self._take(stream, requests)
                    if len(requests) == SLICE:  # after fewer, reading the next message gives others their turn
                        await asyncio.sleep(0)
                    await stream.wait_for_room()
            elif kind == "cancel":
                for request_ids in _slices(message.cancel.request_ids):
                    for request_id in request_ids:
                        stream.cancel(request_id)
                    await asyncio.sleep(0)
            else:
                raise ProtocolViolation(f"expected `requests` or `cancel`, got {kind}")
        stream.half_close()

    def _take(self, stream: ClientStream, requests: Sequence[Any]) -> None:
        limits = self._limits
        for request in requests:
            stream.check_new(request.request_id)
            try:
                sequence = convert.sequence_from_message(
                    request,
                    vocab_size=self._scheduler.info.vocab_size,
                    max_sequence_tokens=limits.max_sequence_tokens,
                )
            except RequestError as error:
                stream.refuse(request.request_id, error)
                continue
            score_request = ScoreRequest(sequence=sequence, spec=stream.spec, draw_set=request.draw_set)
            stream.submit(request.request_id, score_request, priority=request.priority)

    async def _send(self, stream: ClientStream, wanted_weights: str, context: Context) -> None:
        while events := await stream.next_events():
            for message, outcomes in reply_messages(events, max_message_bytes=self._limits.max_message_bytes):
                start = time.perf_counter()
                with stream.sending(outcomes):
                    await _write(context, message)
                metrics.TEACHER_STAGE_SECONDS.labels("send").observe(time.perf_counter() - start)
            _check_weights(wanted_weights, self._scheduler.info.weights_digest)


def described(info: TeacherInfo, limits: StreamLimits, id_model: bytes, tokenizer_rules: str) -> TeacherInfo:
    """What `Describe` tells of a backend behind this server's limits."""
    return replace(
        info,
        max_sequence_tokens=limits.max_sequence_tokens,
        max_in_flight_tokens=limits.max_in_flight_tokens,
        max_message_bytes=limits.max_message_bytes,
        id_model=id_model,
        tokenizer_rules=tokenizer_rules,
        server_version=version("logitstream"),
    )


def _client(message: pb.Open | pb.ScoreRequest) -> str:
    """Who asks: the name of its token, or else what it calls itself."""
    client_id: str = caller.get() or message.client_id
    return client_id


def result_message(index: int, outcome: Scored | RequestError) -> pb.ScoreResult:
    if isinstance(outcome, RequestError):
        return pb.ScoreResult(index=index, error=convert.error_to_message(outcome))
    return pb.ScoreResult(
        index=index,
        targets=outcome.payload,
        teacher_version=outcome.teacher_version,
        weights_digest=bytes.fromhex(outcome.weights_digest)[: convert.WIRE_DIGEST_BYTES],
    )


async def _in_turns(items: Sequence[T]) -> AsyncIterator[T]:
    """Yield the items; every SLICE of them others have their turn on the event loop."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % SLICE == 0:
            await asyncio.sleep(0)


def _outcome(future: asyncio.Future[Scored]) -> Scored | RequestError:
    error = future.exception()
    if error is not None and not isinstance(error, RequestError):
        raise error
    return error or future.result()


def _slices(requests: Sequence[T]) -> Iterator[Sequence[T]]:
    """A message's requests in parts, each small enough to be handled at a time."""
    if len(requests) > MAX_MESSAGE_REQUESTS:
        raise ProtocolViolation(f"{len(requests)} requests in one message: the limit is {MAX_MESSAGE_REQUESTS}")
    return (requests[start : start + SLICE] for start in range(0, len(requests), SLICE))


def _check_weights(wanted: str, served: str) -> None:
    if wanted and wanted != served:
        raise FingerprintMismatch(f"the student wants weights {wanted[:64]}, this server serves {served}")


def _expected(group: BaseExceptionGroup[BaseException]) -> LogitstreamError:
    """The error that ends the stream; raises the group where it holds something else, a bug of ours."""
    expected, unexpected = group.split(LogitstreamError)
    if unexpected is not None or expected is None:
        raise group
    error: BaseException = expected
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, LogitstreamError)
    return error


async def _write(context: Context, message: bytes) -> None:
    try:
        await context.write(message)
    except aio.InternalError:
        raise _ClientGone from None


async def _abort(context: Context, error: LogitstreamError) -> None:
    """End the call with `error`; where its client has gone, gRPC cancels it as soon as it has noticed as well."""
    try:
        if not isinstance(error, _ClientGone):
            await context.abort(status_of(error), str(error))
    except aio.InternalError:
        pass
    await asyncio.sleep(GONE_SECONDS)
