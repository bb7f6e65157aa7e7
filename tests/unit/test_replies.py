"""Answers on their way into messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from logitstream.errors import InvalidSequence
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.replies import RESULTS_BYTES, reply_messages
from teacher_server.scheduler import Scored
from teacher_server.stream import Event, Outcome


def outcomes(sizes: list[int]) -> list[Event]:
    scored = [Scored(payload=b"x" * size, teacher_version=0, weights_digest="ab" * 32) for size in sizes]
    return [Outcome(request_id=number, num_tokens=1, was_taken=True, answer=one) for number, one in enumerate(scored)]


def test_results_share_a_message_up_to_the_smaller_of_the_two_bounds() -> None:
    events = outcomes([60_000, 60_000, 5_000, 60_000])
    for limit, expected in ((1 << 16, [[0], [1, 2], [3]]), (8 << 20, [[0, 1, 2, 3]])):
        replies = list(reply_messages(events, max_message_bytes=limit))
        assert [[one.request_id for one in sent] for _, sent in replies] == expected
    large = outcomes([RESULTS_BYTES // 2 + 1] * 2)
    assert len(list(reply_messages(large, max_message_bytes=8 << 20))) == 2


def test_refusals_and_small_answers_are_counted_as_what_they_take_on_the_wire() -> None:
    refusal = InvalidSequence("é" * 40)
    events: list[Event] = [
        Outcome(request_id=(1 << 64) - 1 - number, num_tokens=0, was_taken=False, answer=refusal)
        for number in range(2000)
    ]
    replies = list(reply_messages(events + outcomes([0] * 2000), max_message_bytes=1 << 16))
    assert sum(len(sent) for _, sent in replies) == 4000
    assert all(1 << 13 < len(message) <= 1 << 16 for message, _ in replies[:-1])


ANSWERS = st.one_of(
    st.builds(
        Scored,
        payload=st.binary(max_size=40_000),
        teacher_version=st.integers(0, (1 << 64) - 1),
        weights_digest=st.binary(min_size=32, max_size=32).map(bytes.hex),
    ),
    st.builds(InvalidSequence, st.text(max_size=200)),
)


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), ANSWERS), min_size=1, max_size=8))
def test_messages_are_what_protobuf_reads(answers: list[tuple[int, Scored | InvalidSequence]]) -> None:
    events: list[Event] = [
        Outcome(request_id=request_id, num_tokens=1, was_taken=True, answer=answer) for request_id, answer in answers
    ]
    replies = list(reply_messages(events, max_message_bytes=1 << 16))
    assert all(len(message) <= 1 << 16 for message, _ in replies)
    messages = [pb.StreamTargetsResponse.FromString(message) for message, _ in replies]
    found = [result for message in messages for result in message.results.results]
    assert found == [expected_result(request_id, answer) for request_id, answer in answers]


def expected_result(request_id: int, answer: Scored | InvalidSequence) -> pb.Result:
    if isinstance(answer, InvalidSequence):
        return pb.Result(request_id=request_id, error=convert.error_to_message(answer))
    return pb.Result(
        request_id=request_id,
        targets=answer.payload,
        teacher_version=answer.teacher_version,
        weights_digest=bytes.fromhex(answer.weights_digest)[:8],
    )
