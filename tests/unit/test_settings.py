"""Settings come from defaults, then the YAML file, then the command line; mistakes are named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

from logitstream.settings import SettingsError, build, parse, setting
from student_worker.__main__ import main as student_main
from student_worker.config import StudentConfig, parse_student
from student_worker.run import write_resolved
from teacher_server.__main__ import main as teacher_main
from teacher_server.config import LimitSettings, TeacherConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    num_samples: int = setting("How many.", 50)
    rate: float = setting("How fast.", 1.0)
    sampler: Literal["plain", "fancy"] = setting("Which.", "plain")
    fast: bool = setting("Whether.", False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    names: list[str] = setting("Which ones.", factory=list)
    word: str = setting("A word.", "")
    maybe: str | None = setting("A word or nothing.", None)
    maybe_fast: bool | None = setting("Whether, or not said.", None)
    shares: dict[str, float] = setting("By name.", factory=dict)
    options: dict[str, Any] = setting("Anything.", factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    draws: Draws = setting("How to draw.", factory=Draws)
    data: Data = setting("What to read.", factory=Data)
    check: bool = setting("Whether to stop there.", False)


def parsed(*words: str) -> Example:
    return parse(Example, words, command="example", description="An example.")


def config(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = config(tmp_path, "draws:\n  num_samples: 7\n  rate: 3e-3\n  fast: true\ndata:\n  names: [a, b]\n")
    assert parsed() == Example()
    draws = Draws(num_samples=7, rate=0.003, fast=True)
    assert parsed(file) == Example(draws=draws, data=Data(names=["a", "b"]))
    overridden = parsed(file, "--draws.num-samples=8", "--data.names", "c", "--check")
    draws = Draws(num_samples=8, rate=0.003, fast=True)
    assert overridden == Example(draws=draws, data=Data(names=["c"]), check=True)


def test_a_mapping_is_json_on_the_command_line_or_set_name_by_name(tmp_path: Path) -> None:
    file = config(tmp_path, "data:\n  shares:\n    a: 1\n    b: 2.5\n")
    assert parsed(file).data.shares == {"a": 1.0, "b": 2.5}
    assert parsed("--data.shares", '{"a": 1, "b": 2.5}').data.shares == {"a": 1.0, "b": 2.5}
    assert parsed(file, "--data.shares.b", "4").data.shares == {"a": 1.0, "b": 4.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("word: no", Data(word="no")),
        ("word: on\n  maybe: true", Data(word="on", maybe="true")),
        ("word: 012\n  maybe: 1e3", Data(word="012", maybe="1e3")),
        ("word: 12:30:45\n  maybe: 2026-11-30", Data(word="12:30:45", maybe="2026-11-30")),
        ("word: 'null'\n  maybe: null", Data(word="null")),
        ("maybe_fast: no", Data(maybe_fast=False)),
        ("names: []", Data()),
        ("names: [no, 1, 1e-3, 'a b']", Data(names=["no", "1", "1e-3", "a b"])),
        ("options: {a: no, b: [1, 0.5], c: d}", Data(options={"a": False, "b": [1, 0.5], "c": "d"})),
        ("", Data()),
    ],
)
def test_a_word_in_the_file_means_what_its_setting_makes_of_it(tmp_path: Path, text: str, expected: Data) -> None:
    assert parsed(config(tmp_path, f"data:\n  {text}")).data == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fast: on", Draws(fast=True)),
        ("num_samples: 1_000\n  rate: 1e-3", Draws(num_samples=1000, rate=0.001)),
        ("rate: .inf", Draws(rate=float("inf"))),
        ("sampler: fancy", Draws(sampler="fancy")),
    ],
)
def test_numbers_and_switches_are_taken_as_yaml_spells_them(tmp_path: Path, text: str, expected: Draws) -> None:
    assert parsed(config(tmp_path, f"draws:\n  {text}")).draws == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draws:\n  sampelr: a", r"unknown setting 'draws.sampelr' in \S+, line 2; did you mean 'draws.sampler'\?"),
        ("drwas:\n  fast: on", r"unknown setting 'drwas' in \S+settings.yaml, line 1; did you mean 'draws"),
        (
            "draws:\n  num_samples: many",
            r"s.yaml, line 2: draws.num_samples: expected int, got 'many'",
        ),
        ("draws:\n  num_samples: 1.5", r"line 2: draws.num_samples: expected int, got 1.5"),
        ("draws:\n  num_samples: [3]", r"draws.num_samples: expected int, got \[3\]"),
        ("draws:\n  fast: maybe", r"line 2: draws.fast: expected bool, got 'maybe'"),
        ("draws:\n  sampler: odd", r"line 2: draws.sampler: expected one of plain, fancy, got 'odd'"),
        ("draws:\n  rate: 1\n  num_samples: 0", r"line 3: draws: num_samples must be at least 1, got 0"),
        ("draws: 3", r"line 1: draws: expected .*Draws, got 3"),
        ("data:\n  word: {a: b}", r"data.word: expected str, got {'a': 'b'}"),
        ("data:\n  shares: 7", r"line 2: data.shares: expected dict.str, float., got 7"),
        ("word\nnumber 3", r"settings.yaml must hold `name: value` pairs, got 'word number 3'"),
        ("data: a\nnumber 3\n", r"(?s)settings.yaml: .*line 2"),
        ("data:\n\tword: 3", r"(?s)settings.yaml: .*line 2"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parsed(config(tmp_path, text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--draws.sampelr", "a"],
            "unknown setting 'draws.sampelr' on the command line; did you mean 'draws.sampler'",
        ),
        (
            ["--num_samples", "3"],
            "setting 'num_samples' on the command line; did you mean 'draws.num_samples'?",
        ),
        (["--draws.num_samples", "3", "4"], "draws.num_samples: expected int, got [3, 4]"),
        (["--draws.num_samples"], "draws.num_samples: expected int, got []"),
        (["--draws", "3", "--draws.fast"], "--draws.fast: a value was given to draws before"),
        (["fast"], "expected --section.name VALUE, got 'fast'"),
        (["--config", "/nowhere/run.yaml"], "No such file or directory: '/nowhere/run.yaml'"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        parsed(*words)


@pytest.mark.parametrize("num_bytes", [(64 << 10) - 1, (64 << 20) + 1])
def test_messages_that_no_vocabulary_or_no_student_goes_with_are_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"max_message_bytes must lie in \[65536, 67108864\], got"):
        LimitSettings(max_message_bytes=num_bytes)


@pytest.mark.parametrize(
    "words",
    [
        ["--model.path", "m", "--data.text", "a.txt", "b.jsonl", "--training.learning_rate", "1e-3"],
        ["--model.config=c.json", "--targets.source=cache", "--cache.path=k", '--cache.provenance={"licence": "x"}'],
    ],
)
def test_the_resolved_settings_of_a_student_are_a_config_that_says_the_same(tmp_path: Path, words: list[str]) -> None:
    def resolve(*words: str) -> tuple[Any, TrainingArguments]:
        config, arguments = parse_student(words)
        return {one.name: getattr(config, one.name) for one in fields(config) if one.name != "training"}, arguments

    folder = tmp_path / "run"
    words = [*words, "--training.report_to", "none", "--training.use_cpu", "--training.output_dir", str(folder)]
    write_resolved(*parse_student(words))
    assert resolve("--config", str(folder / "config.yaml")) == resolve(*words)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ({"optim_target_modules": ["q_proj", "v_proj"]}, "optim_target_modules", ["q_proj", "v_proj"]),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules", "all-linear"),
        ({"learning_rate": "1e-3"}, "learning_rate", 0.001),
        ({"save_strategy": "no"}, "save_strategy", "no"),
        ({"lr_scheduler_kwargs": '{"min_lr": 0.1}'}, "lr_scheduler_kwargs", {"min_lr": 0.1}),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint", "true"),
        ({"logging_steps": "0.5"}, "logging_steps", 0.5),
    ],
)
def test_the_trainers_settings_are_taken_by_their_types(words: dict[str, Any], name: str, value: object) -> None:
    arguments = build(TrainingArguments, {"report_to": "none", "use_cpu": "true"} | words, "training.")
    assert getattr(arguments, name) == value


@pytest.mark.parametrize(
    ("command", "word", "near"),
    [
        (student_main, "--teacher.adresses", "teacher.addresses"),
        (student_main, "--resume", "training.resume_from_checkpoint"),
        (student_main, "--learning-rte", "training.learning_rate"),
        (student_main, "--training.learning-rte", "training.learning_rate"),
        (teacher_main, "--modle", "model.path"),
        (teacher_main, "--server.adress", "server.address"),
    ],
)
def test_a_typo_is_named_whatever_else_is_missing(
    capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None], word: str, near: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command([word, "x", "--model.path", "m", "--data.text", "t"][: 6 if word.startswith("--training") else 2])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"did you mean '{near}'?" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["student_worker", "teacher_server"])
def test_help_lists_every_setting_of_ours_without_importing_torch(command: str) -> None:
    program = (
        f"import sys\nfrom {command}.__main__ import main\ntry:\n    main(['--help'])\n"
        "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for name in ("--metrics.port", "--targets.sampler" if command == "student_worker" else "--vllm.options"):
        assert f"  {name} " in shown or f"  {name}\n" in shown


def test_the_trainers_settings_are_listed_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(StudentConfig, ["--help-all"], command="student-worker", description="")
    shown = capsys.readouterr().out
    assert not [one.name for one in fields(TrainingArguments) if one.init and f"--training.{one.name}" not in shown]
    assert "initial learning rate for the optimizer." in " ".join(shown.split())


@pytest.mark.parametrize("cls", [StudentConfig, TeacherConfig])
def test_every_setting_says_what_it_is(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(cls, ["--help"], command="c", description="")
    lines = capsys.readouterr().out.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            assert lines[number + 1].startswith("      "), line
