"""Start-time fair queueing (Goyal et al., SIGCOMM 1996): whose turn is next when several clients want the one teacher.

Each client has a virtual time that its served cost moves on; the client with the smallest one that has something
waiting is next. A client that comes (back) starts at the present, not in the past, so idling earns no credit.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from typing import Generic, Protocol, TypeVar


class Entry(Protocol):
    """An item that waits; it is hashed by identity."""

    client_id: str
    cost: int
    priority: int


Item = TypeVar("Item", bound=Entry)


class _Client(Generic[Item]):
    def __init__(self) -> None:
        self.virtual_time = 0.0
        self.waiting: defaultdict[int, OrderedDict[Item, None]] = defaultdict(OrderedDict)  # by priority, as they came


class FairQueue(Generic[Item]):
    """The items of many clients that wait. Clients that wait for nothing and owe nothing are forgotten."""

    def __init__(self) -> None:
        self._clients: defaultdict[str, _Client[Item]] = defaultdict(_Client)
        self._now = 0.0
        self.cost = 0

    def push(self, item: Item) -> None:
        """Queue an item; within a client the smallest priority is next, then the earliest arrival."""
        client = self._clients[item.client_id]
        if not client.waiting:
            client.virtual_time = max(client.virtual_time, self._now)
        client.waiting[item.priority][item] = None
        self.cost += item.cost

    def pop(self, max_cost: float = math.inf) -> Item | None:
        """Take the next item and charge its client; None if nothing waits or the next one costs more."""
        waiting = [client for client in self._clients.values() if client.waiting]
        if not waiting:
            return None
        client = min(waiting, key=lambda client: client.virtual_time)
        item = next(iter(client.waiting[min(client.waiting)]))
        if item.cost > max_cost:
            return None
        self._now = max(self._now, client.virtual_time)
        client.virtual_time += item.cost
        self.cancel(item)
        return item

    def cancel(self, item: Item) -> bool:
        """Take an item out without a charge; return False if it does not wait."""
        client = self._clients.get(item.client_id)
        if client is None or item not in client.waiting.get(item.priority, ()):
            return False
        self.cost -= item.cost
        del client.waiting[item.priority][item]
        if not client.waiting[item.priority]:
            del client.waiting[item.priority]
        if not self.cost:  # nobody waits: the busy period is over, and all debts end with it
            self._clients.clear()
        elif not client.waiting:
            for name, one in list(self._clients.items()):
                if not one.waiting and one.virtual_time <= self._now:
                    del self._clients[name]
        return True
