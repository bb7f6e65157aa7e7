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
from teacher_server.stream import CreditChanged, DrainStarted, Event, Outcome
from teacher_server.work import Scored

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
    num_bytes = num_payload_bytes = num_scored = 0
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
                yield _message(parts, num_bytes), outcomes
                parts, outcomes, num_bytes = [], [], 0
            parts += head, payload
            outcomes.append(event)
            num_bytes += size
            num_payload_bytes += len(payload)
            num_scored += isinstance(event.answer, Scored)
    if outcomes:
        yield _message(parts, num_bytes), outcomes
    metrics.TEACHER_SEQUENCES.inc(num_scored)
    metrics.TEACHER_PAYLOAD_BYTES.inc(num_payload_bytes)


def _message(parts: list[bytes], num_bytes: int) -> bytes:
    return b"".join((RESPONSE_TAG, varint(num_bytes), *parts))


def _result(outcome: Outcome) -> tuple[bytes, bytes]:
    """One of a message's results as two parts: all that precedes its targets, and these."""
    result, targets = pb.Result(request_id=outcome.request_id), b""
    if isinstance(outcome.answer, RequestError):
        result.error.CopyFrom(convert.error_to_message(outcome.answer))
        body = result.SerializeToString()
    else:
        targets = outcome.answer.payload
        result.teacher_version = outcome.answer.teacher_version
        result.weights_digest = _wire_digest(outcome.answer.weights_digest)
        body = result.SerializeToString() + TARGETS_TAG + varint(len(targets))
    return RESULT_TAG + varint(len(body) + len(targets)) + body, targets


@functools.lru_cache(maxsize=8)
def _wire_digest(weights_digest: str) -> bytes:
    return bytes.fromhex(weights_digest)[: convert.WIRE_DIGEST_BYTES]
