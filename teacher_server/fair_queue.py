"""Start-time fair queueing: whose turn is next when several clients want the one teacher.

Each client has a virtual time that its served cost moves on; the client with the smallest one that has something
waiting is next. A client that comes (back) starts at the present, not in the past, so idling earns no credit. After
P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False)
class Ticket(Generic[Item]):
    """One item's place in its client's queue."""

    item: Item
    client_id: str
    cost: int
    priority: int


@dataclass(slots=True, eq=False)
class _Client(Generic[Item]):
    virtual_time: float
    cost: int = 0
    tickets: defaultdict[int, OrderedDict[Ticket[Item], None]] = field(
        default_factory=lambda: defaultdict(OrderedDict)
    )  # by priority, in the order of arrival


class FairQueue(Generic[Item]):
    """The items of many clients that wait. Clients that wait for nothing and owe nothing are forgotten."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client[Item]] = {}
        self._now = 0.0
        self.cost = 0

    def push(self, item: Item, *, client_id: str, cost: int, priority: int = 0) -> Ticket[Item]:
        """Queue an item; within a client the smallest priority is next, then the earliest arrival."""
        client = self._clients.setdefault(client_id, _Client(self._now))
        if not client.cost:
            client.virtual_time = max(client.virtual_time, self._now)
        ticket = Ticket(item, client_id, cost, priority)
        client.tickets[priority][ticket] = None
        client.cost += cost
        self.cost += cost
        return ticket

    def peek(self) -> Ticket[Item] | None:
        """Return the ticket that `pop` takes next."""
        waiting = [client for client in self._clients.values() if client.tickets]
        if not waiting:
            return None
        tickets = min(waiting, key=lambda client: client.virtual_time).tickets
        return next(iter(tickets[min(tickets)]))

    def pop(self) -> Ticket[Item]:
        """Take the next ticket and charge its client. Raises IndexError if nothing waits."""
        ticket = self.peek()
        if ticket is None:
            raise IndexError("nothing waits")
        client = self._clients[ticket.client_id]
        self._now = max(self._now, client.virtual_time)
        client.virtual_time += ticket.cost
        self.cancel(ticket)
        return ticket

    def cancel(self, ticket: Ticket[Item]) -> None:
        """Take a ticket out without a charge; does nothing if it was popped or cancelled before."""
        client = self._clients.get(ticket.client_id)
        if client is None or ticket not in client.tickets.get(ticket.priority, ()):
            return
        del client.tickets[ticket.priority][ticket]
        if not client.tickets[ticket.priority]:
            del client.tickets[ticket.priority]
        client.cost -= ticket.cost
        self.cost -= ticket.cost
        if not client.tickets:
            self._forget_idle()

    def _forget_idle(self) -> None:
        if not self.cost:  # nobody waits: the busy period is over, and all debts end with it
            self._now = max(client.virtual_time for client in self._clients.values())
        for name in [one for one, client in self._clients.items() if not client.tickets]:
            if self._clients[name].virtual_time <= self._now:
                del self._clients[name]
