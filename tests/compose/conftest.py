"""The Docker engine of the compose tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.compose.cluster import engine, give_up


@pytest.fixture(scope="session")
def docker_environment() -> Iterator[dict[str, str]]:
    """Docker's environment, for all tests of the session."""
    with ExitStack() as stack:
        try:
            environment = stack.enter_context(engine())
        except RuntimeError as error:
            give_up("THE CLUSTER WAS NOT TESTED", error)
        yield environment
