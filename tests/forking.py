"""Processes forked from one that has imported everything and runs nothing: a start costs what the work costs.

They end with that process, which ends with the tests.
"""

from __future__ import annotations

import multiprocessing

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    ["tests.chaos.chaos_worker", "tests.chaos.chaos_teacher", "tests.chaos.killed_runs", "tests.chaos.warm"]
)
