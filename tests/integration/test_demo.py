"""The demo ends what it started, whatever happens, and says why where something failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from demo.__main__ import ChildFailed, child, tail, wait_for
from demo.report import plot_loss, rows, write_html

GRANDCHILD = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])"
)


def processes_naming(word: str) -> list[int]:
    """Running processes that have a word in their command line."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if any(word in part for part in process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and process.pid != os.getpid()
    ]


def wait_until_gone(word: str) -> None:
    deadline = time.monotonic() + 30
    while processes_naming(word):
        assert time.monotonic() < deadline, processes_naming(word)
        time.sleep(0.1)


def test_a_child_and_its_children_are_ended_when_something_fails(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")

    def fail_beside_a_child() -> None:
        with child(["-c", GRANDCHILD, mark], tmp_path / "log"):
            deadline = time.monotonic() + 30
            while len(processes_naming(mark)) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            raise RuntimeError("a failure elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        fail_beside_a_child()
    wait_until_gone(mark)


PARENT = """
import sys
from pathlib import Path
from demo.__main__ import child
with child(["-c", sys.argv[1], sys.argv[2]], Path(sys.argv[3])) as process:
    process.wait()
"""
TIED_GRANDCHILD = """
import subprocess, sys
tied = "import sys, time; from logitstream.processes import end_with_parent; end_with_parent(); "
tied += "open(sys.argv[1], 'w').close(); time.sleep(600)"
subprocess.run([sys.executable, "-c", tied, sys.argv[1]])
"""


def test_a_child_and_its_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    with subprocess.Popen([sys.executable, "-c", PARENT, TIED_GRANDCHILD, mark, str(tmp_path / "log")]) as parent:
        deadline = time.monotonic() + 30
        while not Path(mark).exists():  # the last one has asked the kernel for it
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(processes_naming(mark)) == 3
        parent.kill()
    wait_until_gone(mark)


CHILD_OF_A_TEST = """
import subprocess, sys, time

def test_with_children():
    subprocess.Popen([sys.executable, "-c", {program!r}, {mark!r}], start_new_session=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_test_run_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """One whose tests run in processes of their own, as those of `make test`; a terminal's Ctrl-C reaches them all."""
    mark = str(tmp_path / "mark")
    (tmp_path / "test_it.py").write_text(CHILD_OF_A_TEST.format(program=GRANDCHILD, mark=mark))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "tests.conftest", str(tmp_path / "test_it.py")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as tests:
        deadline = time.monotonic() + 60
        while len(processes_naming(mark)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (os.killpg if number == signal.SIGINT else os.kill)(tests.pid, number)
    wait_until_gone(mark)


def test_a_child_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "print('the reason'); print('x torch/distributed/elastic/y'); raise SystemExit(3)"
    with (
        child(["-c", program], log) as process,
        pytest.raises(ChildFailed, match=r"worker ended with status 3 before serving:\n  the reason\n  \(whole log"),
    ):
        wait_for(lambda: False, {"worker": (process, log)}, seconds=60, what="serving")
    assert "elastic" not in tail(log)


def test_a_child_that_ends_as_expected_while_it_is_looked_at_has_not_failed(tmp_path: Path) -> None:
    with child(["-c", "pass"], tmp_path / "log") as process:
        process.wait()
        answers = iter([False])  # it was still running then
        wait_for(lambda: next(answers, True), {"worker": (process, tmp_path / "log")}, seconds=60, what="its end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_teacher_and_students(tmp_path: Path, teacher_dir: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "demo", "--sequences", "1024", "--output", str(tmp_path / "run")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    with started as demo:
        assert demo.stdout is not None
        assert any("loading the teacher" in line for line in demo.stdout)
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "teacher.log").exists() or len(processes_naming(str(tmp_path))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        demo.send_signal(number)
        assert demo.wait(60) == (-number if number == signal.SIGKILL else 130)
    wait_until_gone(str(tmp_path))


def test_the_report_shows_what_was_measured_and_leaves_out_what_was_not(tmp_path: Path) -> None:
    report = {
        "heldout_loss_before": 10.8,
        "heldout_loss_after": 6.5,
        "teacher_heldout_loss": 3.4,
        "entries_per_token": None,
    }
    progress = [{"tokens": 100 * step, "loss": 9.0 / step} for step in range(1, 5)]
    plot_loss(progress, report, tmp_path / "loss.png")
    write_html(report, tmp_path / "loss.png", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert ("held-out loss after", "6.500 nats") in rows(report)
    assert len(rows(report)) == 3
    assert "6.500 nats" in page
    assert json.dumps(6.5) in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="http' not in page
