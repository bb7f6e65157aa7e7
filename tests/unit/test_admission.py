"""Which calls are taken: shares of the active clients, the bound on the whole server, and who is never kept out."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from logitstream.errors import TooManyInFlight
from teacher_server.admission import REMEMBERED_SECONDS, Admission


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None, *, in_flight: int = 10_000, queue: int = 10_000) -> Admission:
    return Admission(max_in_flight_tokens=in_flight, max_queue_tokens=queue, clock=clock or Clock())


def hold_all(taken: Admission, client_id: str, stack: ExitStack, *, cost: int = 1000) -> int:
    """Make calls until one is refused; return their tokens."""
    held = 0
    while True:
        try:
            stack.enter_context(taken.hold(client_id, [cost]))
        except TooManyInFlight:
            return held
        held += cost


def test_a_call_holds_its_tokens_until_each_result_is_released_and_the_rest_until_it_ends() -> None:
    taken = admission()
    with taken.hold("x", [1000, 2000]) as release:
        assert (taken.num_calls, taken.num_tokens) == (1, 3000)
        release(1000)
        assert taken.num_tokens == 2000
        release(2000)
        assert taken.num_tokens == 0
    with pytest.raises(ZeroDivisionError), taken.hold("x", [1000]):
        raise ZeroDivisionError
    assert (taken.num_calls, taken.num_tokens) == (0, 0)


def test_a_client_alone_may_hold_the_whole_server_up_to_what_one_client_may() -> None:
    for in_flight, expected in ((10_000, 10_000), (4000, 4000)):
        with ExitStack() as stack:
            assert hold_all(admission(in_flight=in_flight), "x", stack) == expected


def test_a_client_that_comes_gets_its_share_as_soon_as_the_others_fall_back_to_theirs() -> None:
    taken = admission()
    with ExitStack() as late:
        with ExitStack() as early:
            assert hold_all(taken, "early", early) == 10_000
            with pytest.raises(
                TooManyInFlight, match="0 tokens of this client in flight and 1000 more: its share is 5000"
            ):
                late.enter_context(taken.hold("late", [1000]))
        with ExitStack() as early:
            assert hold_all(taken, "early", early) == 5000  # the other one's share is kept for it
            assert hold_all(taken, "late", late) == 5000


def test_a_client_that_went_away_leaves_its_share_to_the_others_after_a_while() -> None:
    clock = Clock()
    taken = admission(clock)
    with taken.hold("gone", [1000]):
        pass
    for seconds, expected in ((0.0, 5000), (REMEMBERED_SECONDS + 1, 10_000)):
        clock.now += seconds
        with ExitStack() as stack:
            assert hold_all(taken, "staying", stack) == expected


def test_all_clients_together_hold_the_queue_and_one_call_at_most() -> None:
    taken = admission()
    with ExitStack() as stack:
        for number in range(50):
            hold_all(taken, f"client {number}", stack, cost=3000)
        assert 10_000 <= taken.num_tokens < 13_000


def test_a_client_that_holds_nothing_may_make_a_call_beyond_its_share_but_not_beyond_the_limit_of_a_call() -> None:
    taken = admission(in_flight=4000)
    for number in range(9):
        with taken.hold(f"client {number}", [1000]):
            pass
    with taken.hold("x", [2000, 2000]), pytest.raises(TooManyInFlight, match="its share is 1000 now"):
        taken.hold("x", [1000]).__enter__()
    with taken.hold("x", [9000]):  # a sequence alone is always taken
        pass
    with pytest.raises(TooManyInFlight, match="a call may have 4000"):
        taken.hold("x", [2000, 2001]).__enter__()


def test_small_calls_and_sequences_count_what_their_bookkeeping_costs() -> None:
    taken = admission()
    with taken.hold("x", [1]):
        assert taken.num_tokens == 512
    with taken.hold("x", [1] * 1000) as release:
        assert taken.num_tokens == 8000
        release(1)
        assert taken.num_tokens == 7992


def test_who_is_turned_away_comes_again_after_about_half_the_time_of_the_last_call() -> None:
    clock = Clock()
    taken = admission(clock)
    for seconds, expected in ((0.0, 0.05), (4.0, 2.0), (60.0, 5.0)):
        with taken.hold("x", [1000]):
            clock.now += seconds
        with taken.hold("x", [10_000]), pytest.raises(TooManyInFlight) as refused:
            taken.hold("x", [1000]).__enter__()
        assert refused.value.retry_after_seconds == expected
