"""Whose turn is next: shares, priorities, cancellation, and memory that follows the clients of the moment."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.fair_queue import FairQueue


@dataclass(eq=False)
class One:
    client_id: str
    cost: int = 1
    priority: int = 0
    name: str = ""


def served(queue: FairQueue[One], count: int) -> list[One]:
    return [pop(queue) for _ in range(count)]


def pop(queue: FairQueue[One]) -> One:
    item = queue.pop()
    assert item is not None
    return item


def shares(items: list[One]) -> dict[str, int]:
    costs: dict[str, int] = {}
    for item in items:
        costs[item.client_id] = costs.get(item.client_id, 0) + item.cost
    return costs


def test_a_flood_of_one_client_leaves_the_other_its_half() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(1000):
        queue.push(One("greedy", cost=10))
    for _ in range(50):
        queue.push(One("small", cost=10))
    assert shares(served(queue, 100)) == {"greedy": 500, "small": 500}


def test_shares_follow_cost() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(400):
        queue.push(One("large", cost=20))
        queue.push(One("small", cost=10))
    costs = shares(served(queue, 200))
    assert costs["large"] / costs["small"] == pytest.approx(1.0, rel=0.05)


def test_within_a_client_the_smallest_priority_comes_first_then_the_earliest() -> None:
    queue: FairQueue[One] = FairQueue()
    for name, priority in (("c", 9), ("a", 1), ("d", 9), ("b", 1)):
        queue.push(One("x", priority=priority, name=name))
    assert [item.name for item in served(queue, 4)] == ["a", "b", "c", "d"]


def test_a_client_that_was_idle_has_saved_up_nothing() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(300):
        queue.push(One("busy"))
    served(queue, 200)
    for _ in range(100):
        queue.push(One("late"))
    assert shares(served(queue, 100))["late"] == pytest.approx(50, abs=1)


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
    queue: FairQueue[One] = FairQueue()
    items: list[One] = []
    waiting: set[One] = set()
    for step in steps:
        if step[0] == "push":
            items.append(One(str(step[1]), cost=int(str(step[2])), priority=int(str(step[3]))))
            queue.push(items[-1])
            waiting.add(items[-1])
        elif step[0] == "cancel" and items:
            item = items[int(str(step[1])) % len(items)]
            assert queue.cancel(item) == (item in waiting)
            waiting.discard(item)
        elif step[0] == "pop" and waiting:
            assert queue.pop(0) is None
            waiting.remove(pop(queue))
        assert queue.cost == sum(item.cost for item in waiting)
    assert set(served(queue, len(waiting))) == waiting
    assert queue.pop() is None


@given(st.integers(2, 5), st.lists(st.integers(1, 50), min_size=40, max_size=40))
def test_no_backlogged_client_falls_behind_by_more_than_two_items(num_clients: int, costs: list[int]) -> None:
    """Start-time fair queueing: served cost of any two backlogged clients differs by at most the largest item of each
    (Goyal et al., theorem 1)."""
    queue: FairQueue[One] = FairQueue()
    received = {f"client {number}": 0 for number in range(num_clients)}
    for client, cost in itertools.product(received, costs):
        queue.push(One(client, cost=cost))
    left = dict.fromkeys(received, len(costs))
    while all(left.values()):
        item = pop(queue)
        left[item.client_id] -= 1
        received[item.client_id] += item.cost
        assert max(received.values()) - min(received.values()) <= 2 * max(costs)


def test_ten_thousand_clients_that_came_once_leave_nothing_behind() -> None:
    queue: FairQueue[One] = FairQueue()
    queue.push(One("busy", priority=1))
    for number in range(10_000):
        queue.push(One("busy"))
        queue.push(One(f"client {number}"))
        served(queue, 2)
    assert len(queue._clients) <= 2


def test_what_is_cancelled_behind_what_waits_is_forgotten_at_once() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(500):
        queue.push(One("x"))
    cancelled: weakref.WeakSet[One] = weakref.WeakSet()
    for _ in range(5_000):
        item = One("x", cost=4096, priority=1)
        cancelled.add(item)
        queue.push(item)
        assert queue.cancel(item)
        assert not queue.cancel(item)
    del item
    assert not cancelled
    assert (queue.cost, len(served(queue, 500))) == (500, 500)
