"""What a stream has to say, as protobuf messages of bounded size.

Results are framed here, so that their targets are copied once: protobuf would copy them into a message and out again,
which is half of what sending costs. The bytes are those of a `StreamTargetsResponse`
(https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from logitstream import metrics
from logitstream.codec import varint
from logitstream.errors import RequestError
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.scheduler import Scored
from teacher_server.stream import CreditChanged, DrainStarted, Event, Outcome

RESULTS_BYTES = 1 << 20
"""A message of results is sent when it holds this much, so that it never comes near the message limit by number."""

LENGTH_DELIMITED = 2
RESPONSE_TAG = bytes([pb.StreamTargetsResponse.RESULTS_FIELD_NUMBER << 3 | LENGTH_DELIMITED])
RESULT_TAG = bytes([pb.Results.RESULTS_FIELD_NUMBER << 3 | LENGTH_DELIMITED])
TARGETS_TAG = bytes([pb.Result.TARGETS_FIELD_NUMBER << 3 | LENGTH_DELIMITED])
ENVELOPE_BYTES = 6  # of the message around its results: a tag and a length


def reply_messages(events: list[Event], *, max_message_bytes: int) -> Iterator[tuple[bytes, list[Outcome]]]:
    """Events as serialized messages, each with the outcomes it carries; results share one up to the smaller of both
    bounds."""
    most_bytes = min(RESULTS_BYTES, max_message_bytes) - ENVELOPE_BYTES
    parts: list[bytes] = []
    outcomes: list[Outcome] = []
    num_bytes = 0
    for event in events:
        if isinstance(event, CreditChanged):
            credit = pb.Credit(max_in_flight_tokens=event.max_in_flight_tokens)
            yield pb.StreamTargetsResponse(credit=credit).SerializeToString(), []
        elif isinstance(event, DrainStarted):
            draining = pb.Draining(grace_seconds=event.grace_seconds)
            yield pb.StreamTargetsResponse(draining=draining).SerializeToString(), []
        else:
            head, payload = _result(event)
            size = len(head) + len(payload)
            if outcomes and num_bytes + size > most_bytes:
                yield _message(parts, outcomes), outcomes
                parts, outcomes, num_bytes = [], [], 0
            parts += head, payload
            outcomes.append(event)
            num_bytes += size
    if outcomes:
        yield _message(parts, outcomes), outcomes


def _message(parts: list[bytes], outcomes: list[Outcome]) -> bytes:
    """Of these parts; the answers that it carries are counted."""
    payloads = [len(one.answer.payload) for one in outcomes if isinstance(one.answer, Scored)]
    metrics.TEACHER_SEQUENCES.inc(len(payloads))
    metrics.TEACHER_PAYLOAD_BYTES.inc(sum(payloads))
    return b"".join((RESPONSE_TAG, varint(sum(map(len, parts))), *parts))


def _result(outcome: Outcome) -> tuple[bytes, bytes]:
    """One of a message's results as two parts: all that precedes its targets, and these."""
    answer = outcome.answer
    if isinstance(answer, RequestError):
        targets = b""
        body = pb.Result(request_id=outcome.request_id, error=convert.error_to_message(answer)).SerializeToString()
    else:
        targets = answer.payload
        result = pb.Result(
            request_id=outcome.request_id,
            teacher_version=answer.teacher_version,
            weights_digest=_wire_digest(answer.weights_digest),
        )
        body = result.SerializeToString() + TARGETS_TAG + varint(len(targets))
    return RESULT_TAG + varint(len(body) + len(targets)) + body, targets


@functools.lru_cache(maxsize=8)
def _wire_digest(weights_digest: str) -> bytes:
    return bytes.fromhex(weights_digest)[: convert.WIRE_DIGEST_BYTES]
