"""Settings: dataclasses filled from one YAML file and overridden field by field on the command line."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

SECONDS_FOR_THE_FIRST_PROCESS = 5.0
"""So long the other processes of torchrun keep their error back, which is the first one's: it ends them meanwhile."""


def setting(
    help_text: str, default: Any = None, *, factory: Callable[[], Any] | None = None, choices: Sequence[str] = ()
) -> Any:
    """A dataclass field with what `--help` says of it."""
    metadata: dict[str, Any] = {"help": help_text} | ({"choices": list(choices)} if choices else {})
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Written:
    """A setting as it stands in the file: as text, texts or, for a mapping, JSON; and the line where."""

    value: str | list[str]
    line: int
    is_bool: bool = False
    is_mapping: bool = False


class _Parser(HfArgumentParser):
    """Says what is wrong in one line instead of after pages of usage, and where; dict settings are JSON objects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written: dict[str, str] = {}
        """Where the settings of a file stand that the command line does not override."""
        for action in self._actions:
            if get_origin(action.type) is dict:
                action.type = _json_object

    def error(self, message: str) -> NoReturn:
        for name in re.findall(r"\w+", message):
            if name in self.written and self.written[name] not in message:
                message = f"{self.written[name]}: {message}"
                break
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n(see {self.prog} --help)\n")


def settings_parser(classes: Sequence[type], *, command: str, description: str) -> argparse.ArgumentParser:
    """Every field of the dataclasses as an option, and --config."""
    parser = _Parser(tuple(classes), prog=command, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; the command line overrides them")
    return parser


def parse_settings(
    classes: Sequence[type], *, command: str, description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """One instance of each dataclass: defaults, then `--config FILE.yaml`, then `--field value`.

    An unknown key, in the file or on the command line, ends the process with an error that names the nearest known one;
    so does a value of the wrong type or one that a dataclass refuses, with the file and the line where it stands.
    """
    parser = settings_parser(classes, command=command, description=description)
    assert isinstance(parser, _Parser)
    types = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    known = {f.name: types[f.name] for cls in classes for f in fields(cls) if f.init}
    try:
        path, arguments = _take_config(list(sys.argv[1:] if argv is None else argv))
        values = _read_yaml(path) if path else {}
        overridden = _names_of_options(arguments)
        parser.written = {name: f"{path}, line {one.line}" for name, one in values.items() if name not in overridden}
        _refuse_unknown(values, known, parser.written)
        lists = _unspeakable_lists(values, known)
        parser.set_defaults(**lists)
        words = [word for name, one in values.items() if name not in lists for word in _words(name, one, known[name])]
        namespace, unknown = parser.parse_known_args(words + arguments)
        _refuse_unknown(_names_of_options(unknown) or unknown, known, {})
        chosen = vars(namespace)
        return tuple(cls(**{f.name: chosen[f.name] for f in fields(cls) if f.init}) for cls in classes)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))


def _names_of_options(words: Iterable[str]) -> list[str]:
    return [word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")]


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text) if text.startswith("{") else None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _takes(hint: Any, wanted: type) -> bool:
    """Whether a field of this type may hold a `wanted`."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(wanted in (part, get_origin(part)) for part in parts)


def _unspeakable_lists(values: dict[str, Written], types: dict[str, Any]) -> dict[str, list[str]]:
    """A file's lists that no words on a command line say: empty ones, and those of settings that take a word there.

    ValueError where a setting takes no list.
    """
    lists = {name: one.value for name, one in values.items() if isinstance(one.value, list)}
    for name, value in lists.items():
        if not _takes(types[name], list):
            raise ValueError(f"{name} takes no list, got {value}")
    return {name: value for name, value in lists.items() if not value or list[str] in get_args(types[name])}


def _words(name: str, written: Written, hint: Any) -> list[str]:
    """A setting of a file as command-line words, so that both are converted and checked alike."""
    if written.is_mapping and not _takes(hint, dict):
        raise ValueError(f"{name} takes no mapping, got {written.value}")
    if isinstance(written.value, list):
        return [f"--{name}", *written.value]
    if written.is_bool and _takes(hint, bool):  # YAML knows more words for true and false than the command line
        return [f"--{name}={yaml.safe_load(written.value)}"]
    return [f"--{name}={written.value}"]


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config and the other arguments."""
    taker = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    taker.add_argument("--config")
    try:
        known, rest = taker.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return known.config, rest


def _read_yaml(path: str) -> dict[str, Written]:
    """The settings as they are spelled: `no`, 1e-3 and 012 mean what the setting's type makes of them."""
    with Path(path).open(encoding="utf-8") as file:
        loader = yaml.SafeLoader(file)
        try:
            node = loader.get_single_node()
            if node is None or node.tag == "tag:yaml.org,2002:null":
                return {}
            if not isinstance(node, yaml.MappingNode):
                kind = type(loader.construct_document(node)).__name__
                raise ValueError(f"{path} must hold `name: value` pairs, got a {kind}")
            loader.flatten_mapping(node)
            return _written_settings(node, loader, path)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path} must hold `name: value` pairs, got lists in lists too deep to read") from error
        finally:
            loader.dispose()


def _written_settings(node: yaml.MappingNode, loader: yaml.SafeLoader, path: str) -> dict[str, Written]:
    found: dict[str, Written] = {}
    for key, value in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in found:
            raise ValueError(f"{path}: {name} stands in line {found[name].line} and again in line {line}")
        if (written := _written(value, loader, line)) is not None:
            found[name] = written
    return found


def _written(node: yaml.Node, loader: yaml.SafeLoader, line: int) -> Written | None:
    """None for null, which is as good as a setting that is not there."""
    if isinstance(node, yaml.MappingNode):
        return Written(json.dumps(loader.construct_document(node)), line, is_mapping=True)
    if isinstance(node, yaml.SequenceNode):
        return Written([str(part.value) for part in node.value], line)
    if node.tag == "tag:yaml.org,2002:null":
        return None
    text = str(node.value)
    if node.tag == "tag:yaml.org,2002:float" and "." in text and not any(digit.isdigit() for digit in text):
        text = str(loader.construct_document(node))  # .inf, .nan
    return Written(text, line, is_bool=node.tag == "tag:yaml.org,2002:bool")


def _refuse_unknown(names: Iterable[str], known: Iterable[str], written: dict[str, str]) -> None:
    """ValueError that names the nearest setting, first one that begins with the word, for one that does not exist."""
    known = sorted(known)
    for name in names:
        if name not in known:
            longer = [one for one in known if len(name) > 3 and one.startswith(name)]
            near = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            where = f"in {written[name]}" if name in written else "on the command line"
            raise ValueError(f"unknown setting {name!r} {where}; did you mean {near[0]!r}?")
