"""What a stream has to say, as protobuf messages of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from logitstream import metrics
from logitstream.errors import RequestError
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.stream import CreditChanged, DrainStarted, Event, Outcome
from teacher_server.work import Scored

RESULTS_BYTES = 1 << 20
"""A message of results is sent when it holds this much, so that it never comes near the message limit by number."""

FRAMING_BYTES = 64
"""At most, of one result: its id, version, digest and their tags and lengths."""


def reply_messages(
    events: list[Event], *, max_message_bytes: int
) -> Iterator[tuple[pb.StreamTargetsResponse, list[Outcome]]]:
    """Events as messages, each with the outcomes it carries; results share one up to the smaller of both bounds."""
    most_bytes = min(RESULTS_BYTES, max_message_bytes)
    results: list[pb.Result] = []
    outcomes: list[Outcome] = []
    num_bytes = 0
    for event in events:
        if isinstance(event, CreditChanged):
            yield pb.StreamTargetsResponse(credit=pb.Credit(max_in_flight_tokens=event.max_in_flight_tokens)), []
        elif isinstance(event, DrainStarted):
            yield pb.StreamTargetsResponse(draining=pb.Draining(grace_seconds=event.grace_seconds)), []
        else:
            size = FRAMING_BYTES + _size(event.answer)
            if results and num_bytes + size > most_bytes:
                yield pb.StreamTargetsResponse(results=pb.Results(results=results)), outcomes
                results, outcomes, num_bytes = [], [], 0
            results.append(_result(event))
            outcomes.append(event)
            num_bytes += size
    if results:
        yield pb.StreamTargetsResponse(results=pb.Results(results=results)), outcomes


def _size(answer: Scored | RequestError) -> int:
    return len(answer.payload) if isinstance(answer, Scored) else len(str(answer).encode()) + len(type(answer).__name__)


def _result(outcome: Outcome) -> pb.Result:
    if isinstance(outcome.answer, RequestError):
        return pb.Result(request_id=outcome.request_id, error=convert.error_to_message(outcome.answer))
    metrics.TEACHER_SEQUENCES.inc()
    metrics.TEACHER_PAYLOAD_BYTES.inc(len(outcome.answer.payload))
    return pb.Result(
        request_id=outcome.request_id,
        targets=outcome.answer.payload,
        teacher_version=outcome.answer.teacher_version,
        weights_digest=bytes.fromhex(outcome.answer.weights_digest)[: convert.WIRE_DIGEST_BYTES],
    )
