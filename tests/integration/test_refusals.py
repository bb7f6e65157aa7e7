"""`student-worker` is refused, or told something other than it needs, and says so in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from student_worker.__main__ import main
from tests.authority import Authority


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (
            ["--teacher.token_file", "{tmp}/odd"],
            1,
            "token_file: {tmp}/odd: expected a token of printable ASCII characters",
        ),
        (["--teacher.token_file", "{tmp}/empty"], 1, "token_file: no token in {tmp}/empty"),
        (["--teacher.token_file", "{tmp}/none"], 1, "token_file: [Errno 2] No such file or directory: '{tmp}/none'"),
        (
            ["--tls.ca", "{tmp}/none"],
            1,
            "tls.ca, tls.cert or tls.key: [Errno 2] No such file or directory: '{tmp}/none'",
        ),
        (
            ["--tls.ca", "{tmp}/empty"],
            1,
            "tls.ca, tls.cert or tls.key: tls.ca {tmp}/empty holds no certificate in PEM",
        ),
        (
            ["--tls.ca", "{tmp}/ca.pem", "--tls.cert", "{tmp}/mine.pem", "--tls.key", "{tmp}/other.key"],
            1,
            "tls.cert {tmp}/mine.pem and tls.key {tmp}/other.key do not go together",
        ),
        (
            ["--tls.cert", "c", "--tls.key", "k"],
            2,
            "TLS needs tls.ca (a PEM file, or `system`)",
        ),
        (
            ["--teacher.addresses", "teacher.example:1"],
            2,
            "plaintext to teacher.example:1 would show the token and the texts",
        ),
        (
            ["--teacher.addresses", "teacher.example"],
            2,
            "expected a teacher address as host:port, got 'teacher.example'",
        ),
    ],
)
def test_who_is_not_let_in_is_told_why_before_anything_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], status: int, told: str
) -> None:
    ours = Authority(tmp_path)
    ours.issue("mine"), ours.issue("other")
    (tmp_path / "odd").write_bytes(b"\xff\xfe token")
    (tmp_path / "empty").write_bytes(b"")
    here = [word.replace("{tmp}", str(tmp_path)) for word in words]
    begun = [
        "--model.path",
        str(tmp_path / "no-model"),
        "--data.text",
        "no-text",
        "--training.output_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*begun, "--training.use_cpu", "true", "--training.report_to", "none", *here])
    assert ended.value.code == status
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("student-worker: ")]
    assert told.replace("{tmp}", str(tmp_path)) in line
