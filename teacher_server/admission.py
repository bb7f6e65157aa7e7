"""How much of the server's memory each client may hold, from its call to the moment a result is handed to gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from logitstream import metrics
from logitstream.errors import TooManyInFlight
from logitstream.types import LEAST_SEQUENCE_TOKENS, call_tokens

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
    """The tokens that one call holds until its answers are written."""

    def __init__(self, admission: Admission, client: Client, num_tokens: int, num_sequences: int) -> None:
        self._admission = admission
        self._client = client
        self._num_sequences = num_sequences
        self.num_tokens = 0
        self.add(num_tokens)

    def add(self, num_tokens: int) -> None:
        """Hold more, or less if the number is negative."""
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
        self._count(client, 1)
        try:
            yield hold
        finally:
            hold.add(-hold.num_tokens)
            self._count(client, -1)
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

    def _count(self, client: Client, change: int) -> None:
        client.num_calls += change
        self.num_calls += change
        metrics.TEACHER_CLIENTS.set(self.num_calls)

    def _forget_idle(self, now: float) -> None:
        idle = [
            name
            for name, client in self._clients.items()
            if not client.num_calls and now - client.came > REMEMBERED_SECONDS
        ]
        for name in idle:
            del self._clients[name]
