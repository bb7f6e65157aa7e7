"""Random faults in real processes: training completes, and every sequence of every epoch is trained on exactly once.

Two real servers around a backend without a model and one that answers everything twice stand behind proxies, two worker
processes train from them. LOGITSTREAM_CHAOS_FAULTS (200) and LOGITSTREAM_CHAOS_SEED change the run; there are more
faults where NUM_EPOCHS take longer. The first server and the first worker suffer everything but their end, and their
memory is watched.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from logitstream import codec
from tests.chaos.chaos_teacher import run_real_server
from tests.chaos.chaos_worker import (
    NUM_SEQUENCES,
    WorkerSettings,
    epochs_done,
    read_audit,
    rss_bytes,
    shard,
    work,
)
from tests.fake_teacher import run_fake_teacher
from tests.fault_proxy import FaultProxy
from tests.forking import SPAWN

NUM_FAULTS = int(os.environ.get("LOGITSTREAM_CHAOS_FAULTS", "200"))
SEED = int(os.environ.get("LOGITSTREAM_CHAOS_SEED", "1"))
NUM_EPOCHS = 3
SECONDS_BETWEEN = 0.2
FINISH_SECONDS = 60.0
"""After the last fault, within the deadline of one request, all workers must have finished their epoch."""


class Actor:
    """A process that is killed and started again."""

    def __init__(self, start: Callable[[], BaseProcess]) -> None:
        self._start = start
        self.process = start()
        self.may_end = self.down = False
        self.failed = ""
        self._lock = threading.Lock()

    def send(self, number: signal.Signals) -> bool:
        """Kill it and tell whether it was running: one that is to be started again soon gets no signal."""
        with self._lock:
            if self.down or not self.process.is_alive() or self.process.pid is None:
                return False
            os.kill(self.process.pid, number)
            self.down = number in (signal.SIGKILL, signal.SIGTERM)
            return True

    def wake(self) -> None:
        """Let it go on, also where it was told to end while it was stopped."""
        with self._lock:
            if self.process.is_alive() and self.process.pid is not None:
                os.kill(self.process.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Wait until it has ended, and start it anew unless it had finished its work."""
        self.process.join(20)
        with self._lock:
            if self.process.exitcode not in (0, -signal.SIGKILL, -signal.SIGTERM):
                self.failed = f"ended with {self.process.exitcode}"
            if not (self.may_end and self.process.exitcode == 0):
                self.process = self._start()
            self.down = False


def start(target: Callable[..., None], *args: object) -> Callable[[], BaseProcess]:
    def starting() -> BaseProcess:
        process = SPAWN.Process(target=target, args=args, daemon=True)
        process.start()
        return process

    return starting


class Chaos:
    """Three teachers, their proxies and two workers, and what may happen to them."""

    def __init__(self, folder: Path) -> None:
        codec.warm_up()  # what is compiled is kept on disk; in the servers the compiler's memory would pass for growth
        self.random = random.Random(SEED)
        self.counts: Counter[str] = Counter()
        self.teacher_rss: list[int] = []
        ports = [free_port() for _ in range(3)]
        self.teachers = [Actor(start(run_real_server, port)) for port in ports[1:]]
        self.teachers.append(Actor(start(run_fake_teacher, answering_twice(ports[0]))))
        self.proxies = [FaultProxy(f"127.0.0.1:{port}") for port in ports]
        self.settings = [
            WorkerSettings(
                rank=rank,
                num_workers=2,
                addresses=tuple(proxy.address for proxy in self.proxies),
                folder=folder,
                with_cache=rank == 1,
            )
            for rank in range(2)
        ]
        self.workers = [Actor(start(work, one)) for one in self.settings]
        self._healing: list[threading.Thread] = []

    def many_faults(self) -> None:
        while sum(self.counts.values()) < NUM_FAULTS or self.epochs_done() < NUM_EPOCHS:
            time.sleep(self.random.uniform(0.5, 1.5) * SECONDS_BETWEEN)
            self.one_fault()
            assert self.teachers[0].process.pid is not None
            self.teacher_rss.append(rss_bytes(self.teachers[0].process.pid))

    def epochs_done(self) -> int:
        return min(epochs_done(worker.audit) for worker in self.settings)

    def one_fault(self) -> None:
        faults = [
            (self.kill_teacher, 3),
            (self.drain_teacher, 1),
            (self.stop_teacher, 3),
            (self.kill_worker, 1),
            (self.stop_worker, 2),
            (self.cut_connections, 4),
            (self.delay, 3),
            (self.narrow, 3),
            (self.slow_reader, 2),
            (self.half_open, 2),
        ]
        while True:
            fault = self.random.choices([one for one, _ in faults], [weight for _, weight in faults])[0]
            if fault():
                self.counts[fault.__name__] += 1
                return

    def kill_teacher(self) -> bool:
        """Never the first."""
        teacher = self.random.choice(self.teachers[1:])
        return teacher.send(signal.SIGKILL) and self.later(0.1, 0.6, teacher.restart)

    def drain_teacher(self) -> bool:
        """Never the first."""
        teacher = self.random.choice(self.teachers[1:])
        return teacher.send(signal.SIGTERM) and self.later(0.1, 0.6, teacher.restart)

    def stop_teacher(self) -> bool:
        teacher = self.random.choice(self.teachers)
        return teacher.send(signal.SIGSTOP) and self.later(0.1, 1.5, teacher.wake)

    def kill_worker(self) -> bool:
        """Never the first."""
        return self.workers[1].send(signal.SIGKILL) and self.later(0.1, 0.5, self.workers[1].restart)

    def stop_worker(self) -> bool:
        worker = self.random.choice(self.workers)
        return worker.send(signal.SIGSTOP) and self.later(0.1, 1.5, worker.wake)

    def cut_connections(self) -> bool:
        self.random.choice(self.proxies).cut()
        return True

    def delay(self) -> bool:
        return self.distort("delay_seconds", 0.2)

    def narrow(self) -> bool:
        return self.distort("bytes_per_second", 10e6 / 8)

    def slow_reader(self) -> bool:
        return self.distort("bytes_per_second", 20e3)

    def half_open(self) -> bool:
        return self.distort("silent", True)

    def distort(self, name: str, value: float) -> bool:
        """Unless that proxy is distorted so already."""
        proxy = self.random.choice(self.proxies)
        if getattr(proxy, name):
            return False
        setattr(proxy, name, value)
        return self.later(0.3, 1.5, lambda: setattr(proxy, name, type(value)(0)))

    def later(self, at_least: float, at_most: float, heal: Callable[[], None]) -> bool:
        seconds = self.random.uniform(at_least, at_most)

        def healing() -> None:
            time.sleep(seconds)
            heal()

        self._healing = [thread for thread in self._healing if thread.is_alive()]
        self._healing.append(threading.Thread(target=healing))
        self._healing[-1].start()
        return True

    def heal_all(self) -> None:
        for thread in self._healing:
            thread.join()

    def close(self) -> None:
        self.heal_all()
        for actor in (*self.workers, *self.teachers):
            actor.send(signal.SIGKILL)
            actor.process.join()
        for proxy in self.proxies:
            proxy.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answering_twice(port: int) -> Namespace:
    return Namespace(port=port, weights="a", version=0, credit=4096, seconds=0.0005, flaky=0, seed=port, grace=1.0)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(300 + NUM_FAULTS)
def test_every_sequence_of_every_epoch_is_trained_on_exactly_once_under_random_faults(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path)
    try:
        for worker in chaos.settings:
            wait_for(lambda worker=worker: worker.audit.exists(), FINISH_SECONDS)  # type: ignore[misc]
        chaos.many_faults()
        for actor in chaos.workers:
            actor.may_end = True
        chaos.settings[0].stop_file.touch()
        chaos.heal_all()
        wait_for(lambda: all(actor.process.exitcode == 0 for actor in chaos.workers), FINISH_SECONDS)
        assert not [actor.failed for actor in (*chaos.workers, *chaos.teachers) if actor.failed]
    finally:
        chaos.close()
    print(f"{sum(chaos.counts.values())} faults, seed {SEED}: {dict(chaos.counts)}")
    for settings in chaos.settings:
        check_audit(settings)
    check_memory("worker", [line["rss"] for line in read_audit(chaos.settings[0].audit)])
    check_memory("teacher", chaos.teacher_rss)


def check_audit(settings: WorkerSettings) -> None:
    """Each batch of each epoch stands there once, in order, with the sequences that it should have."""
    lines = read_audit(settings.audit)
    num_epochs = lines[-1]["epoch"] + 1
    print(f"worker {settings.rank}: {num_epochs} epochs, {len(lines)} batches")
    assert num_epochs >= NUM_EPOCHS
    want = [
        (epoch, number, sequences)
        for epoch in range(num_epochs)
        for number, sequences in enumerate(shard(settings, epoch))
    ]
    assert [(line["epoch"], line["batch"], line["sequences"]) for line in lines] == want
    for epoch in range(num_epochs):
        trained = [index for line in lines if line["epoch"] == epoch for index in line["sequences"]]
        assert len(trained) == len(set(trained)) == NUM_SEQUENCES // settings.num_workers


def check_memory(whose: str, rss: list[int]) -> None:
    """No growth: the last quarter's median is not above the second's by more than the noise of an allocator."""
    quarter = len(rss) // 4
    early, late = statistics.median(rss[quarter : 2 * quarter]), statistics.median(rss[-quarter:])
    print(f"{whose}'s memory: {early / 1e6:.1f} MB early, {late / 1e6:.1f} MB late")
    assert late - early < 0.03 * early


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
