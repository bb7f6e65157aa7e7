"""Settings come from defaults, then the YAML file, then the command line; mistakes are named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from logitstream.settings import parse_settings, setting
from student_worker.config import StudentConfig
from student_worker.run import write_resolved


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
