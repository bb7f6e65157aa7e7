"""Settings: dataclasses filled from one YAML file and overridden field by field on the command line."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser


def setting(
    help_text: str, default: Any = None, *, factory: Callable[[], Any] | None = None, choices: Sequence[str] = ()
) -> Any:
    """A dataclass field with what `--help` says of it."""
    metadata: dict[str, Any] = {"help": help_text} | ({"choices": list(choices)} if choices else {})
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    """Says what is wrong in one line instead of after pages of usage; dict settings are JSON objects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if get_origin(action.type) is dict:
                action.type = _json_object

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n(see {self.prog} --help)\n")


def parse_settings(
    classes: Sequence[type], *, command: str, description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """One instance of each dataclass: defaults, then `--config FILE.yaml`, then `--field value`.

    An unknown key, in the file or on the command line, ends the process with an error that names the nearest known one;
    so does a value of the wrong type or one that a dataclass refuses.
    """
    parser = _Parser(tuple(classes), prog=command, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; the command line overrides them")
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    try:
        path, arguments = _take_config(list(sys.argv[1:] if argv is None else argv))
        values = _read_yaml(path) if path else {}
        _refuse_unknown(values, known, f"in {path}")
        lists = _unspeakable_lists(values, classes)
        parser.set_defaults(**lists)
        words = _as_arguments({name: value for name, value in values.items() if name not in lists})
        *instances, unknown = parser.parse_args_into_dataclasses(
            args=words + arguments, return_remaining_strings=True, look_for_args_file=False
        )
        options = [word.split("=")[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("--")]
        _refuse_unknown(options or unknown, known, "on the command line")
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    return tuple(instances[: len(classes)])


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text) if text.startswith("{") else None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _unspeakable_lists(values: dict[str, Any], classes: Sequence[type]) -> dict[str, list[Any]]:
    """A file's lists that no words on a command line say: empty ones, and those of settings that take a word there.

    ValueError where a setting takes no list.
    """
    types = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    lists: dict[str, list[Any]] = {name: value for name, value in values.items() if isinstance(value, list)}
    for name in lists:
        if list not in (get_origin(types[name]), *map(get_origin, get_args(types[name]))):
            raise ValueError(f"{name} takes no list, got {lists[name]}")
    return {name: value for name, value in lists.items() if not value or list[str] in get_args(types[name])}


def _as_arguments(values: dict[str, Any]) -> list[str]:
    """Settings of a file as command-line words, so that both are converted and checked alike."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config and the other arguments."""
    taker = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    taker.add_argument("--config")
    known, rest = taker.parse_known_args(arguments)
    return known.config, rest


def _read_yaml(path: str) -> dict[str, Any]:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` pairs, got a {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _refuse_unknown(names: Iterable[str], known: set[str], where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise ValueError(f"unknown setting {name!r} {where}; did you mean {near[0]!r}?")
