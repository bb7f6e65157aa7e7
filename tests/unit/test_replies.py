"""Answers on their way into messages."""

from __future__ import annotations

from logitstream.errors import InvalidSequence
from teacher_server.replies import RESULTS_BYTES, reply_messages
from teacher_server.stream import Event, Outcome
from teacher_server.work import Scored


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
    assert all(1 << 13 < message.ByteSize() <= 1 << 16 for message, _ in replies[:-1])
