"""Settings come from defaults, then the YAML file, then the command line; mistakes are named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from logitstream.settings import parse_settings, setting
from student_worker.__main__ import main as student_main
from student_worker.config import StudentConfig
from student_worker.run import write_resolved
from teacher_server.__main__ import main as teacher_main
from teacher_server.config import TeacherConfig


@dataclass(kw_only=True)
class Example:
    num_samples: int = setting("How many.", 50)
    rate: float = setting("How fast.", 1.0)
    names: list[str] = setting("Which ones.", factory=list)
    shares: dict[str, float] = setting("Of whom.", factory=dict)
    fast: bool = setting("Whether.", False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")


def parse(*argv: str) -> Example:
    (example,) = parse_settings([Example], command="example", description="An example.", argv=argv)
    assert isinstance(example, Example)
    return example


def config(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = config(tmp_path, "num_samples: 7\nrate: 3e-3\nnames: [a, b]\nfast: true\n")
    assert parse() == Example()
    assert parse(file) == Example(num_samples=7, rate=0.003, names=["a", "b"], fast=True)
    assert parse(file, "--num_samples", "8", "--names", "c") == Example(
        num_samples=8, rate=0.003, names=["c"], fast=True
    )


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("num_sample: 3", [], "unknown setting 'num_sample' in .*did you mean 'num_samples'"),
        ("", ["--num_sample", "3"], "unknown setting 'num_sample' on the command line; did you mean 'num_samples'"),
        ("num_samples: 1.5", [], "invalid int value: '1.5'"),
        ("num_samples: 0", [], "must be at least 1, got 0"),
        ("- a\n- b", [], "must hold `name: value` pairs, got a list"),
    ],
)
def test_a_mistake_ends_the_process_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(config(tmp_path, text), *argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "usage:" not in error


def test_a_dict_is_a_mapping_in_the_file_and_json_on_the_command_line(tmp_path: Path) -> None:
    file = config(tmp_path, "shares:\n  a: 1\n  b: 2.5\n")
    assert parse(file).shares == parse("--shares", '{"a": 1, "b": 2.5}').shares == {"a": 1, "b": 2.5}


def test_a_dict_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--shares", "7")
    assert "expected a JSON object, got '7'" in capsys.readouterr().err


@pytest.mark.parametrize("num_bytes", [(64 << 10) - 1, (64 << 20) + 1])
def test_messages_that_no_vocabulary_or_no_student_goes_with_are_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"max_message_bytes must lie in \[65536, 67108864\], got"):
        TeacherConfig(model="m", max_message_bytes=num_bytes)


def test_an_empty_list_in_the_file_is_one_and_may_be_overridden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, "names: []\nnum_samples: 7\n")
    assert parse(file) == Example(num_samples=7)
    assert parse(file, "--names", "a") == Example(num_samples=7, names=["a"])
    with pytest.raises(SystemExit):
        parse(config(tmp_path, "num_samples: []\n"))
    assert "num_samples takes no list" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "m", "--text", "a.txt", "b.jsonl"],
        ["--model_config", "c.json", "--targets", "cache", "--cache", "k", "--cache_provenance", '{"licence": "x"}'],
    ],
)
def test_the_resolved_settings_of_a_student_are_a_config_that_says_the_same(tmp_path: Path, words: list[str]) -> None:
    def resolve(*argv: str) -> list[Any]:
        return list(parse_settings([StudentConfig, TrainingArguments], command="student", description=".", argv=argv))

    folder = tmp_path / "run"
    config, arguments = resolve(*words, "--report_to", "none", "--use_cpu", "--output_dir", str(folder))
    write_resolved(config, arguments)
    assert resolve("--config", str(folder / "config.yaml")) == [config, arguments]


def test_a_list_of_a_setting_that_takes_a_word_or_a_list_is_taken_whole(tmp_path: Path) -> None:
    file = config(tmp_path, "optim_target_modules: [q_proj, v_proj]\nreport_to: none\nuse_cpu: true\n")
    (arguments,) = parse_settings([TrainingArguments], command="trainer", description=".", argv=[file])
    assert arguments.optim_target_modules == ["q_proj", "v_proj"]


@dataclass(kw_only=True)
class Spelled:
    word: str = setting("A word.", "")
    maybe: str | None = setting("A word or nothing.", None)
    fast: bool = setting("Whether.", False)
    maybe_fast: bool | None = setting("Whether, or not said.", None)
    number: int = setting("A number.", 0)
    rate: float = setting("A rate.", 0.0)
    words: list[str] = setting("Words.", factory=list)
    options: dict[str, Any] = setting("Options.", factory=dict)


def spelled(folder: Path, text: str) -> Spelled:
    argv = [config(folder, text)]
    (parsed,) = parse_settings([Spelled], command="spelled", description=".", argv=argv)
    assert isinstance(parsed, Spelled)
    return parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("word: no", Spelled(word="no")),
        ("word: on\nmaybe: true", Spelled(word="on", maybe="true")),
        ("word: 012\nmaybe: 1e3", Spelled(word="012", maybe="1e3")),
        ("word: 12:30:45\nmaybe: 2026-11-30", Spelled(word="12:30:45", maybe="2026-11-30")),
        ("word: 'null'\nmaybe: null\nnumber: ~", Spelled(word="null")),
        ("fast: on\nmaybe_fast: no", Spelled(fast=True, maybe_fast=False)),
        ("fast: yes\nnumber: 1_000\nrate: 1e-3", Spelled(fast=True, number=1000, rate=0.001)),
        ("rate: .inf", Spelled(rate=float("inf"))),
        ("words: [no, 1, 1e-3, 'a b']", Spelled(words=["no", "1", "1e-3", "a b"])),
        ("options: {a: no, b: [1, 0.5], c: 'no'}", Spelled(options={"a": False, "b": [1, 0.5], "c": "no"})),
    ],
)
def test_a_word_in_the_file_means_what_its_setting_makes_of_it(tmp_path: Path, text: str, expected: Spelled) -> None:
    assert spelled(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word: a\n\nnumbr: 3", r"unknown setting 'numbr' in \S+settings.yaml, line 3; did you mean 'number'\?"),
        ("word: a\nnumber: many", r"settings.yaml, line 2: argument --number: invalid int value: 'many'"),
        ("word: a\nword: b", r"settings.yaml: word stands in line 1 and again in line 2"),
        ("word: [a, b]", r"settings.yaml, line 1: word takes no list, got \['a', 'b'\]"),
        ("word: {a: b}", r"settings.yaml, line 1: word takes no mapping"),
        ("word\nnumber 3", r"settings.yaml must hold `name: value` pairs, got a str"),
        (
            f"word: {'[' * 3000}{']' * 3000}",
            r"settings.yaml must hold `name: value` pairs, got lists in lists too deep",
        ),
        ("word: a\nnumber 3\n", r"settings.yaml is no YAML: .*line 2"),
        ("word: a\n\tnumber: 3", r"settings.yaml is no YAML: .*line 2"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        spelled(tmp_path, text)
    error = capsys.readouterr().err
    assert re.search(f"^spelled: .*{message}", error)
    assert len(error.splitlines()) == 2  # and where help is


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--config", "/nowhere/run.yaml")
    assert "No such file or directory: '/nowhere/run.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "word", "near"),
    [
        (student_main, "--teacher-serverr", "teacher"),
        (student_main, "--resume", "resume_from_checkpoint"),
        (student_main, "--learning-rte", "learning_rate"),
        (teacher_main, "--modle", "model"),
        (teacher_main, "--adress", "address"),
    ],
)
def test_a_typo_is_named_whatever_else_is_missing(
    capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None], word: str, near: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command([word, "x"])
    assert stopped.value.code == 2
    assert f"did you mean '{near}'?" in capsys.readouterr().err


def test_the_students_help_lists_every_setting_without_importing_torch() -> None:
    program = (
        "import sys; from student_worker.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for settings in (StudentConfig, TrainingArguments):
        missing = [f.name for f in fields(settings) if f.init and f"--{f.name}" not in shown]
        assert not missing
    assert "initial learning rate for the optimizer. (default: 5e-05)" in " ".join(shown.split())
    assert "at a cost of ~10% slower" in " ".join(shown.split())
