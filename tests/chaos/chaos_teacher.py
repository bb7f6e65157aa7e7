"""The real teacher server around a backend without a model, whose targets the chaos worker can check."""

from __future__ import annotations

from collections.abc import Sequence

from logitstream.errors import RequestError
from logitstream.types import SparseTargets, TeacherInfo
from teacher_server.backend import ScoreRequest
from teacher_server.server import Served, serve
from tests.fake_teacher import expected_targets, fake_info
from tests.flat_settings import teacher_config


class CheckableBackend:
    """Answers at once."""

    def describe(self) -> TeacherInfo:
        return fake_info()

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        return [expected_targets(request.sequence, request.draw_set) for request in batch]

    def healthy(self) -> bool:
        return True

    def close(self) -> None: ...


def run_real_server(port: int) -> None:
    """Serve until SIGTERM."""
    config = teacher_config(
        model="fake", address=f"127.0.0.1:{port}", max_in_flight_tokens=4096, max_batch_tokens=1024, drain_seconds=1.0
    )
    serve(config, lambda: Served(CheckableBackend()))
