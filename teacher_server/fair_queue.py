"""Start-time fair queueing: whose turn is next when several clients want the one teacher.

Each client has a virtual time that its served cost, over its weight, moves on; the client with the smallest one that
has something waiting is next. A client that comes (back) starts at the present, not in the past, so idling earns no
credit. After P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class Ticket(Generic[Item]):
    """One item's place in its client's queue."""

    item: Item
    client_id: str
    cost: int
    waiting: bool = True


@dataclass(slots=True, eq=False)
class _Client(Generic[Item]):
    weight: float
    virtual_time: float
    cost: int = 0
    heap: list[tuple[int, int, Ticket[Item]]] = field(default_factory=list)  # (priority, arrival, ticket)
    num_stale: int = 0  # tickets in the heap that were cancelled


class FairQueue(Generic[Item]):
    """The items of many clients that wait; every operation takes O(log n) or O(number of clients)."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._clients: dict[str, _Client[Item]] = {}
        self._now = 0.0
        self._arrivals = 0
        self.cost = 0

    def cost_of(self, client_id: str) -> int:
        """Return the cost that this client has waiting."""
        client = self._clients.get(client_id)
        return client.cost if client else 0

    @property
    def size(self) -> tuple[int, int]:
        """Clients and tickets in memory, cancelled ones included."""
        return len(self._clients), sum(len(client.heap) for client in self._clients.values())

    def push(self, item: Item, *, client_id: str, cost: int, priority: int = 0) -> Ticket[Item]:
        """Queue an item; within a client the smallest priority is next, then the earliest arrival."""
        client = self._clients.get(client_id)
        if client is None:
            client = self._clients[client_id] = _Client(self._weights.get(client_id, 1.0), self._now)
        if client.cost == 0:
            client.virtual_time = max(client.virtual_time, self._now)
        ticket = Ticket(item, client_id, cost)
        self._arrivals += 1
        heapq.heappush(client.heap, (priority, self._arrivals, ticket))
        client.cost += cost
        self.cost += cost
        return ticket

    def peek(self) -> Ticket[Item] | None:
        """Return the ticket that `pop` takes next."""
        waiting = [client for client in self._clients.values() if client.cost > 0]
        if not waiting:
            return None
        client = min(waiting, key=lambda client: client.virtual_time)
        while not client.heap[0][2].waiting:
            heapq.heappop(client.heap)
            client.num_stale -= 1
        return client.heap[0][2]

    def pop(self) -> Ticket[Item]:
        """Take the next ticket and charge its client. Raises IndexError if nothing waits."""
        ticket = self.peek()
        if ticket is None:
            raise IndexError("nothing waits")
        client = self._clients[ticket.client_id]
        heapq.heappop(client.heap)
        self._now = max(self._now, client.virtual_time)
        client.virtual_time += ticket.cost / client.weight
        self._leave(ticket, client)
        return ticket

    def cancel(self, ticket: Ticket[Item]) -> None:
        """Take `ticket` out without a charge; does nothing if it was popped or cancelled before."""
        if ticket.waiting:
            client = self._clients[ticket.client_id]
            del ticket.item  # the heap keeps the ticket for a while
            client.num_stale += 1
            self._leave(ticket, client)
            if client.num_stale > len(client.heap) // 2:  # the heap must not grow with what is cancelled
                client.heap = [entry for entry in client.heap if entry[2].waiting]
                client.num_stale = 0
                heapq.heapify(client.heap)

    def _leave(self, ticket: Ticket[Item], client: _Client[Item]) -> None:
        ticket.waiting = False
        client.cost -= ticket.cost
        self.cost -= ticket.cost
        if client.cost == 0:
            client.heap.clear()
            client.num_stale = 0
            self._forget_idle()

    def _forget_idle(self) -> None:
        """Drop clients that wait for nothing and owe nothing, so that memory follows the present clients.

        If nobody waits, the busy period is over and all debts end with it.
        """
        if self.cost == 0:
            self._now = max(client.virtual_time for client in self._clients.values())
        idle = [name for name, client in self._clients.items() if not client.cost and client.virtual_time <= self._now]
        for name in idle:
            del self._clients[name]
