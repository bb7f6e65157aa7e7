"""Settings: dataclasses filled from one YAML file and overridden field by field on the command line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArgumentParser


def parse_settings(
    classes: Sequence[type], *, command: str, description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """One instance of each dataclass: defaults, then `--config FILE.yaml`, then `--field value`.

    An unknown key, in the file or on the command line, ends the process with an error that names the nearest known one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(tuple(classes), prog=command, description=description)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; the command line overrides them")
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    try:
        path, arguments = _take_config(arguments)
        values = _read_yaml(path) if path else {}
        _refuse_unknown(values, known, f"in {path}")
        parser.set_defaults(**values)
        for action in parser._actions:  # a value from the file satisfies a required option
            if action.dest in values:
                action.required = False
        *instances, unknown = parser.parse_args_into_dataclasses(
            args=arguments, return_remaining_strings=True, look_for_args_file=False
        )
        options = [word.split("=")[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("--")]
        _refuse_unknown(dict.fromkeys(options or unknown), known, "on the command line")
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        parser.exit(2, f"{command}: {error}\n")
    return tuple(instances[: len(classes)])


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config and the other arguments."""
    path: str | None = None
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise ValueError("--config needs the path of a YAML file")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return path, rest


def _read_yaml(path: str) -> dict[str, Any]:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` pairs, got a {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _refuse_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise ValueError(f"unknown setting {name!r} {where}; did you mean {near[0]!r}?")
