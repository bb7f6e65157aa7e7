"""Whose turn is next: shares, priorities, cancellation, and memory that follows the clients of the moment."""

from __future__ import annotations

import itertools
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.fair_queue import FairQueue, Item


def served(queue: FairQueue[Item], count: int) -> list[Item]:
    return [queue.pop().item for _ in range(count)]


def test_a_flood_of_one_client_leaves_the_other_its_half() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(1000):
        queue.push("greedy", client_id="greedy", cost=10)
    for _ in range(50):
        queue.push("small", client_id="small", cost=10)
    assert served(queue, 100).count("small") == 50


def test_shares_follow_cost() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(400):
        queue.push("large", client_id="large", cost=20)
        queue.push("small", client_id="small", cost=10)
    counts = dict.fromkeys(("large", "small"), 0)
    for _ in range(200):
        ticket = queue.pop()
        counts[ticket.item] += ticket.cost
    assert counts["large"] / counts["small"] == pytest.approx(1.0, rel=0.05)


def test_within_a_client_the_smallest_priority_comes_first_then_the_earliest() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, priority in (("c", 9), ("a", 1), ("d", 9), ("b", 1)):
        queue.push(name, client_id="x", cost=1, priority=priority)
    assert served(queue, 4) == ["a", "b", "c", "d"]


def test_a_client_that_was_idle_has_saved_up_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(300):
        queue.push("busy", client_id="busy", cost=1)
    served(queue, 200)
    for _ in range(100):
        queue.push("late", client_id="late", cost=1)
    assert served(queue, 100).count("late") == pytest.approx(50, abs=1)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.sampled_from("abcd"), st.integers(1, 100), st.integers(0, 3)),
            st.tuples(st.just("pop")),
            st.tuples(st.just("cancel"), st.integers(0, 200)),
        ),
        max_size=200,
    )
)
def test_costs_always_add_up_and_nothing_is_lost_or_served_twice(steps: list[tuple[object, ...]]) -> None:
    queue: FairQueue[int] = FairQueue()
    waiting: dict[int, tuple[str, int]] = {}
    tickets = {}
    numbers = itertools.count()
    for step in steps:
        if step[0] == "push":
            number, client, cost = next(numbers), str(step[1]), int(str(step[2]))
            tickets[number] = queue.push(number, client_id=client, cost=cost, priority=int(str(step[3])))
            waiting[number] = (client, cost)
        elif step[0] == "cancel" and tickets:
            number = int(str(step[1])) % len(tickets)
            queue.cancel(tickets[number])
            waiting.pop(number, None)
        elif step[0] == "pop" and waiting:
            peeked = queue.peek()
            ticket = queue.pop()
            assert ticket is peeked
            assert waiting.pop(ticket.item) == (ticket.client_id, ticket.cost)
        assert queue.cost == sum(cost for _, cost in waiting.values())
    assert sorted(served(queue, len(waiting))) == sorted(waiting)
    assert queue.peek() is None


@given(st.integers(2, 5), st.lists(st.integers(1, 50), min_size=40, max_size=40))
def test_no_backlogged_client_falls_behind_by_more_than_two_items(num_clients: int, costs: list[int]) -> None:
    """Start-time fair queueing: served cost of any two backlogged clients differs by at most the largest item of each
    (Goyal et al., theorem 1)."""
    queue: FairQueue[str] = FairQueue()
    received = {f"client {number}": 0 for number in range(num_clients)}
    for client in received:
        for cost in costs:
            queue.push(client, client_id=client, cost=cost)
    left = dict.fromkeys(received, len(costs))
    while all(left.values()):
        ticket = queue.pop()
        left[ticket.item] -= 1
        received[ticket.item] += ticket.cost
        assert max(received.values()) - min(received.values()) <= 2 * max(costs)


def test_ten_thousand_clients_that_came_once_leave_nothing_behind() -> None:
    queue: FairQueue[Large] = FairQueue()
    gone: weakref.WeakSet[Large] = weakref.WeakSet()
    for number in range(10_000):
        gone.add(queue.push(Large(), client_id=f"client {number}", cost=1).item)
        queue.pop()
    assert not gone
    assert not queue._clients


class Large:
    """An item of which one can tell whether it is still there."""


def test_what_is_cancelled_behind_what_waits_is_forgotten_at_once() -> None:
    queue: FairQueue[Large] = FairQueue()
    for _ in range(500):
        queue.push(Large(), client_id="x", cost=1, priority=0)
    cancelled: weakref.WeakSet[Large] = weakref.WeakSet()
    for _ in range(5_000):
        ticket = queue.push(Large(), client_id="x", cost=4096, priority=1)
        cancelled.add(ticket.item)
        queue.cancel(ticket)
        queue.cancel(ticket)
    del ticket
    assert not cancelled
    assert (queue.cost, len(served(queue, 500))) == (500, 500)
