"""Clients' credit: it falls and is still honoured for a while, shares, the number of streams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstream.errors import TooManyInFlight
from teacher_server.admission import GRACE_SECONDS, MAX_REQUESTS, Account, Accounts, Allowance


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def accounts(clock: Clock | None = None, **limits: int) -> Accounts:
    defaults = {
        "max_in_flight_tokens": 1000,
        "max_queue_tokens": 1000,
        "max_sequence_tokens": 10,
        "max_streams": 100,
        "max_client_streams": 100,
    }
    return Accounts(**defaults | limits, clock=clock or Clock())


def hold_all(shared: Accounts, account: Account, *, streams: int, cost: int = 10) -> None:
    """Ask on each stream in turn, the newest first, until everything more is refused."""
    held = [0] * streams
    for stream in reversed(range(streams)):
        while True:
            try:
                shared.check_room(account, cost, held_by_stream=held[stream])
            except TooManyInFlight:
                break
            held[stream] += cost
            account.num_tokens += cost


@given(st.lists(st.tuples(st.floats(0.0, GRACE_SECONDS), st.integers(0, 9)), min_size=1))
def test_an_allowance_is_the_largest_value_of_the_last_while(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    allowance = Allowance(5, clock)
    periods = [(0.0, 5)]
    for seconds, value in steps:
        clock.now += seconds
        allowance.set(value)
        periods.append((clock.now, value))
        ends = [start for start, _ in periods[1:]] + [clock.now]
        recent = [one for (_, one), end in zip(periods, ends, strict=True) if end + GRACE_SECONDS > clock.now]
        assert allowance.value == max(recent)


def test_requests_sent_before_a_lowered_credit_was_heard_are_taken_and_later_ones_are_not() -> None:
    clock = Clock()
    shared = accounts(clock)
    ours = shared.open("ours")
    for number in range(9):
        shared.open(f"other {number}")
    assert shared.credit == 100
    ours.num_tokens = 900
    shared.check_room(ours, 100, held_by_stream=900)
    clock.now += GRACE_SECONDS
    ours.num_tokens = 90
    shared.check_room(ours, 10, held_by_stream=90)
    with pytest.raises(TooManyInFlight, match="90 tokens in flight and 11 more: the stream's credit is 100"):
        shared.check_room(ours, 11, held_by_stream=90)


@pytest.mark.parametrize("streams", [1, 4, 50])
def test_the_streams_of_one_client_hold_no_more_than_the_queue_and_a_sequence_each(streams: int) -> None:
    shared = accounts()
    for _ in range(streams):
        account = shared.open("greedy")
    hold_all(shared, account, streams=streams)
    assert 1000 <= account.num_tokens <= 1000 + 10 * streams


def test_all_clients_together_hold_the_queue_once_their_credit_is_known() -> None:
    clock = Clock()
    shared = accounts(clock)
    several = [shared.open(f"client {number}") for number in range(10)]
    clock.now += GRACE_SECONDS
    for account in several:
        hold_all(shared, account, streams=1)
    assert sum(account.num_tokens for account in several) == 1000


def test_a_stream_that_holds_nothing_may_ask_for_one_sequence_whatever_the_others_hold() -> None:
    shared = accounts()
    account = shared.open("x")
    shared.open("x")
    account.num_tokens = 1_000_000
    shared.check_room(account, 500, held_by_stream=0)
    with pytest.raises(TooManyInFlight, match="on 2 streams of this client"):
        shared.check_room(account, 1, held_by_stream=1)


def test_small_requests_are_bounded_by_their_number() -> None:
    shared = accounts(max_in_flight_tokens=1 << 30, max_queue_tokens=1 << 30)
    first, second = shared.open("first"), shared.open("second")
    first.num_requests = MAX_REQUESTS // 2
    with pytest.raises(TooManyInFlight, match="its share is"):
        shared.check_room(first, 1, held_by_stream=1)
    shared.check_room(second, 1, held_by_stream=1)


def test_one_client_s_streams_lock_nobody_out() -> None:
    shared = accounts(max_streams=5, max_client_streams=3)
    for _ in range(3):
        shared.check_streams("greedy")
        greedy = shared.open("greedy")
    with pytest.raises(TooManyInFlight, match="3 streams of client 'greedy' are open: the limit of a client is 3"):
        shared.check_streams("greedy")
    shared.check_streams("other")
    shared.close(greedy)
    shared.check_streams("greedy")
    for number in range(3):
        shared.open(f"other {number}")
    with pytest.raises(TooManyInFlight, match="5 streams are open: the server's limit is 5"):
        shared.check_streams("other")
