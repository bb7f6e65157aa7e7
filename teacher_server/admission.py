"""What each client holds of the server's memory, from a request to its answer's way out, and what it may hold."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from logitstream.errors import TooManyInFlight
from logitstream.types import LEAST_SEQUENCE_TOKENS, call_tokens

GRACE_SECONDS = 30.0
"""How long a lowered credit may take to be heard: requests sent before are taken up to the former one."""
MAX_REQUESTS = 1 << 17
"""Requests in the whole server, which bounds what requests of a few tokens cost in bookkeeping."""
NAME_CHARS = 64


class Allowance:
    """The largest value of the last GRACE_SECONDS."""

    def __init__(self, value: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._values = deque([(value, math.inf)])  # each smaller than the one before; when it ceases to count

    def set(self, value: int) -> None:
        self._values.append((self._values.pop()[0], self._clock() + GRACE_SECONDS))
        while self._values and self._values[-1][0] <= value:
            self._values.pop()
        self._values.append((value, math.inf))

    @property
    def value(self) -> int:
        while self._values[0][1] <= self._clock():
            self._values.popleft()
        return self._values[0][0]


@dataclass(slots=True, eq=False)
class Account:
    """One client's streams and what they hold in all."""

    client_id: str
    allowance: Allowance
    num_streams: int = 0
    num_tokens: int = 0
    num_requests: int = 0


class Accounts:
    """Shares max_queue_tokens between streams: each is told its part as credit, a client may hold that of its streams.

    With n clients that came one after another and read nothing, all may hold (1 + 1/2 + … + 1/n) times that.
    """

    def __init__(
        self,
        *,
        max_in_flight_tokens: int,
        max_queue_tokens: int,
        max_sequence_tokens: int,
        max_streams: int,
        max_client_streams: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_in_flight_tokens = max_in_flight_tokens
        self._max_queue_tokens = max_queue_tokens
        self._max_sequence_tokens = max_sequence_tokens
        self._max_streams = max_streams
        self._max_client_streams = max_client_streams
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self.num_streams = 0
        self._credit = Allowance(self.credit, clock)

    @property
    def credit(self) -> int:
        """Tokens that each stream may have in flight, so that all of them fit into the queue."""
        share = self._max_queue_tokens // max(1, self.num_streams)
        return min(self._max_in_flight_tokens, max(share, self._max_sequence_tokens))

    def check_streams(self, client_id: str) -> None:
        """Raises TooManyInFlight where this client may open no further stream."""
        if self.num_streams >= self._max_streams:
            raise TooManyInFlight(f"{self.num_streams} streams are open: the server's limit is {self._max_streams}")
        account = self._accounts.get(client_id)
        if account is not None and account.num_streams >= self._max_client_streams:
            raise TooManyInFlight(
                f"{account.num_streams} streams of client {client_id[:NAME_CHARS]!r} are open: "
                f"the limit of a client is {self._max_client_streams}"
            )

    def open(self, client_id: str) -> Account:
        """A stream more."""
        account = self._accounts.get(client_id)
        if account is None:
            account = self._accounts[client_id] = Account(client_id, Allowance(0, self._clock))
        self._count_streams(account, 1)
        return account

    def close(self, account: Account) -> None:
        """A stream less."""
        self._count_streams(account, -1)
        if not account.num_streams:
            del self._accounts[account.client_id]

    def check_room(self, account: Account, num_tokens: int, *, held_by_stream: int) -> None:
        """Raises TooManyInFlight; a stream that holds nothing may always ask for one sequence."""
        limit = self._credit.value
        if held_by_stream and held_by_stream + num_tokens > limit:
            raise TooManyInFlight(
                f"{held_by_stream} tokens in flight and {num_tokens} more: the stream's credit is {limit}"
            )
        limit = account.allowance.value
        if held_by_stream and account.num_tokens + num_tokens > limit:
            raise TooManyInFlight(
                f"{account.num_tokens} tokens in flight on {account.num_streams} streams of this client and "
                f"{num_tokens} more: their credit is {limit}"
            )
        share = MAX_REQUESTS // len(self._accounts)
        if account.num_requests >= share:
            raise TooManyInFlight(f"{account.num_requests} requests of this client in flight: its share is {share}")

    def _count_streams(self, account: Account, change: int) -> None:
        self.num_streams += change
        account.num_streams += change
        self._credit.set(self.credit)
        for each in self._accounts.values():
            each.allowance.set(each.num_streams * self.credit)


REMEMBERED_SECONDS = 5.0
"""A client that was turned away keeps its share of the server this long."""
RETRY_SECONDS = (0.05, 5.0)


@dataclass(slots=True, eq=False)
class Client:
    """One client's calls, and what they hold."""

    num_calls: int = 0
    num_tokens: int = 0
    came: float = 0.0


class Hold:
    """What one call holds until its answers are written."""

    def __init__(self, admission: Admission, client: Client, num_tokens: int, num_sequences: int) -> None:
        self._admission = admission
        self._client = client
        self._num_sequences = num_sequences
        self.num_tokens = 0
        self.add(num_tokens)

    def add(self, num_tokens: int) -> None:
        """Hold more; less where it is negative."""
        self.num_tokens += num_tokens
        self._client.num_tokens += num_tokens
        self._admission.num_tokens += num_tokens

    def release(self, num_tokens: int) -> None:
        """Give back what one sequence held; with the last one, all that is left."""
        self._num_sequences -= 1
        all_left = self._num_sequences == 0
        self.add(-self.num_tokens if all_left else -max(num_tokens, LEAST_SEQUENCE_TOKENS))


class Admission:
    """Decides which calls are taken: each active client has an equal share of max_queue_tokens.

    A client that holds nothing is let in with any call of up to max_in_flight_tokens, or of one sequence, while the
    whole server holds less than max_queue_tokens. So the server holds one call more than that at most, and nobody is
    kept out for long: what is beyond a client's share is not renewed when another client comes.
    """

    def __init__(
        self, *, max_in_flight_tokens: int, max_queue_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_in_flight_tokens = max_in_flight_tokens
        self._max_queue_tokens = max_queue_tokens
        self._clock = clock
        self._clients: dict[str, Client] = {}
        self._call_seconds = RETRY_SECONDS[0]
        self.num_calls = 0
        self.num_tokens = 0

    @contextmanager
    def hold(self, client_id: str, costs: Sequence[int]) -> Iterator[Hold]:
        """Hold these sequences' tokens for the time of a call. Raises TooManyInFlight."""
        num_tokens = call_tokens(costs)
        client = self._clients.setdefault(client_id, Client())
        client.came = began = self._clock()
        self._forget_idle(began)
        self._check(client, num_tokens, fits=sum(costs) <= self._max_in_flight_tokens or len(costs) == 1)
        hold = Hold(self, client, num_tokens, len(costs))
        client.num_calls += 1
        self.num_calls += 1
        try:
            yield hold
        finally:
            hold.add(-hold.num_tokens)
            client.num_calls -= 1
            self.num_calls -= 1
            self._call_seconds = self._clock() - began

    def _check(self, client: Client, num_tokens: int, *, fits: bool) -> None:
        share = min(self._max_in_flight_tokens, self._max_queue_tokens // len(self._clients))
        if self.num_tokens < self._max_queue_tokens and (
            client.num_tokens + num_tokens <= share or (not client.num_tokens and fits)
        ):
            return
        error = TooManyInFlight(
            f"{client.num_tokens} tokens of this client in flight and {num_tokens} more: its share is {share} now "
            f"(of {self._max_queue_tokens} in the whole server), and a call may have {self._max_in_flight_tokens}"
        )
        shortest, longest = RETRY_SECONDS
        error.retry_after_seconds = min(max(self._call_seconds / 2, shortest), longest)
        raise error

    def _forget_idle(self, now: float) -> None:
        idle = [
            name
            for name, client in self._clients.items()
            if not client.num_calls and now - client.came > REMEMBERED_SECONDS
        ]
        for name in idle:
            del self._clients[name]
