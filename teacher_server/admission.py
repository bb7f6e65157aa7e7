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

    def is_forgotten(self, now: float) -> bool:
        return not self.num_calls and now - self.came > REMEMBERED_SECONDS


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
    def hold(self, client_id: str, costs: Sequence[int]) -> Iterator[Callable[[int], None]]:
        """Hold these sequences' tokens for the time of a call. Raises TooManyInFlight.

        The function that it gives takes the cost of a sequence whose result is sent, and gives back what that held.
        """
        now = began = self._clock()
        for name in [one for one, idle in self._clients.items() if idle.is_forgotten(now)]:
            del self._clients[name]
        client = self._clients.setdefault(client_id, Client())
        client.came = now
        held, unanswered = call_tokens(costs), len(costs)
        self._check(client, held, fits=sum(costs) <= self._max_in_flight_tokens or len(costs) == 1)

        def add(num_tokens: int, num_calls: int = 0) -> None:
            client.num_tokens += num_tokens
            client.num_calls += num_calls
            self.num_tokens += num_tokens
            self.num_calls += num_calls

        def release(cost: int) -> None:
            nonlocal held, unanswered
            unanswered -= 1
            given_back = max(cost, LEAST_SEQUENCE_TOKENS) if unanswered else held
            held -= given_back
            add(-given_back)

        add(held, 1)
        metrics.TEACHER_CLIENTS.set(self.num_calls)
        try:
            yield release
        finally:
            add(-held, -1)
            metrics.TEACHER_CLIENTS.set(self.num_calls)
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
