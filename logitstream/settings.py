"""Settings: nested frozen dataclasses from defaults, one YAML file and `--section.name value` on the command line.

Own code, because the libraries fall short: jsonargparse 4.53 takes neither slotted dataclasses nor `--data.text a b`,
tyro 1.0 reads no files, and neither names the nearest setting and the line for a typo in a file.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
Tree = dict[str, Any]
NULL = ("", "~", "null")
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "one word",
    list: "a list",
}


class SettingsError(ValueError):
    """A setting that does not exist, has a value of another type, or is refused."""


class Text(str):
    """A name or value as it is spelled; `where` is the file and line it comes from, empty for the command line."""

    where = ""


class Words(list[Any]):
    """What follows an option on the command line: a list, or the value itself if it is one word."""


def setting(
    help_text: str, default: Any = MISSING, *, factory: Any = MISSING, later: Callable[[], type] | None = None
) -> Any:
    """Return a dataclass field with its sentence of help.

    later: imports the dataclass of a section that is slow to import; `parse` leaves the section as texts by name.
    """
    metadata = {"help": help_text} | ({"later": later} if later else {})
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def require_at_least(settings: object, least: int, *names: str) -> None:
    """Raise ValueError for a number below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")


def parse(cls: type[T], words: Sequence[str], *, command: str, description: str) -> T:
    """Return the settings; --help prints them and exits, --help-all with those of `later`. Raises SettingsError."""
    if {"-h", "--help", "--help-all"} & set(words):
        print(f"usage: {command} [--config FILE.yaml] [--section.name VALUE ...]\n\n{textwrap.fill(description, 110)}")
        print("\n".join(_help(cls, everything="--help-all" in words)))
        sys.exit(0)
    given = _read_words(words)
    file = given.pop("config", None)
    return build(cls, given if file is None else _merged(_read_yaml(Path("".join(file))), given))


def build(cls: type[T], tree: Mapping[str, Any], path: str = "", root: type | None = None) -> T:
    """Return an instance of a dataclass from texts or values by name, sections as mappings. Raises SettingsError."""
    known = {one.name: (one, hint) for one, hint, _ in _sections(cls)}
    values: Tree = {}
    for name, value in tree.items():
        if name not in known:
            names = list(_names(root)) if root else [path + one for one in _names(cls)]
            place = getattr(name, "where", "")
            where = f"in {place}" if place else "on the command line"
            near = _nearest(path + name, names)
            raise SettingsError(f"unknown setting '{path}{name}' {where}; did you mean '{near}'?")
        one, hint = known[name]
        values[name] = value if "later" in one.metadata else _convert(hint, value, path + name, root or cls)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        named = [value for name, value in tree.items() if name in re.findall(r"\w+", str(error))]
        raise SettingsError(f"{_place(*named[:1])}{path and path[:-1] + ': '}{error}") from error


def _convert(hint: Any, value: Any, path: str, root: type) -> Any:
    """Return the value that a type makes of a text, a list or a mapping. Raises SettingsError: expected, came."""
    if isinstance(value, Words) and len(value) == 1:
        (value,) = value
    kind, parts = get_origin(hint) or hint, get_args(hint)
    text = "" if value is None else str(value).lower()
    if kind in (Union, UnionType):
        if text in NULL and NoneType in parts:
            return None
        for part in sorted(parts, key=lambda one: one in (str, NoneType)):  # any text is a str, so that comes last
            if isinstance(value, list) or list not in (part, get_origin(part)):
                try:
                    return _convert(part, value, path, root)
                except SettingsError:
                    continue
    elif is_dataclass(kind) and (text in NULL or isinstance(value, dict)):
        return build(hint, {} if text in NULL else value, f"{path}.", root)
    elif kind is Any:
        return _plain(value)
    elif kind is Literal and str(value) in parts:
        return str(value)
    elif kind is list and not isinstance(value, dict):
        items = value if isinstance(value, list) else [value]
        return [_convert(parts[0] if parts else Any, one, path, root) for one in items]
    elif kind is dict and (isinstance(value, dict) or text.startswith("{")):
        pairs = value if isinstance(value, dict) else json.loads(value)
        return {str(key): _convert(parts[1] if parts else Any, one, path, root) for key, one in pairs.items()}
    elif kind is bool and (value == [] or text in SWITCH):  # [] is an option without a value
        return value == [] or SWITCH[text]
    elif (kind in (int, float, str) and not isinstance(value, list | dict)) or _is_enum(kind):
        try:
            return kind(re.sub(r"^(-?)\.(inf|nan)$", r"\1\2", str(value)))  # as YAML spells them
        except ValueError:
            pass
    raise SettingsError(f"{_place(value)}{path}: expected {_expected(hint)}, got {_plain(value)!r}")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _expected(hint: Any) -> str:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_expected(part) for part in parts if part is not NoneType)
    if kind is Literal or _is_enum(kind):
        return f"one of {', '.join(parts or [str(one.value) for one in kind])}"
    return KINDS.get(kind, "a mapping" if kind is dict else "a section of settings")


def _place(*values: Any) -> str:
    return "".join(f"{one.where}: " for one in values if getattr(one, "where", ""))


def _plain(value: Any) -> Any:
    """Return what YAML makes of texts whose type is not known."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return yaml.safe_load(value) if isinstance(value, Text) else value


def _read_words(words: Sequence[str]) -> Tree:
    """Return `--section.name value ...` as nested mappings."""
    tree: Tree = {}
    given: Words | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            *sections, last = name.replace("-", "_").split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
                if not isinstance(node, dict):
                    raise SettingsError(f"--{name}: a value was given to {section} before")
            node[last] = given = Words([Text(value)] if equals else [])
        elif given is None:
            raise SettingsError(f"expected --section.name VALUE, got {word!r}")
        else:
            given.append(Text(word))
    return tree


class _Loader(yaml.BaseLoader):
    """Keeps values as they are spelled (the setting's type decides what `no` and 1e-3 are), with their lines."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Text:
        text = Text(node.value)
        text.where = f"{self.name}, line {node.start_mark.line + 1}"
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if lines.setdefault(name, line) != line:
                raise SettingsError(f"{self.name}: {name} stands in line {lines[name]} and again in line {line}")
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> Tree:
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)  # builds texts, lists and mappings alone
    except RecursionError as error:
        raise SettingsError(f"{path} holds lists in lists too deep to read") from error
    except (OSError, UnicodeError) as error:
        raise SettingsError(str(error)) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {error}") from error
    if not isinstance(tree, dict) and str(tree).lower() not in NULL:
        raise SettingsError(f"{path} must hold `name: value` pairs, got {tree!r}")
    return tree if isinstance(tree, dict) else {}


def _merged(below: Tree, above: Tree) -> Tree:
    both = [name for name, value in above.items() if isinstance(value, dict) and isinstance(below.get(name), dict)]
    return below | above | {name: _merged(below[name], above[name]) for name in both}


def _sections(cls: Any, *, everything: bool = False) -> Iterator[tuple[Field[Any], Any, Any]]:
    """Yield each field with its type and, if it is a section, the dataclass of the section."""
    hints = get_type_hints(cls)
    for one in fields(cls):
        later, hint = one.metadata.get("later"), hints[one.name]
        if one.init:
            yield one, hint, hint if is_dataclass(hint) else later() if later and everything else None


def _names(cls: Any) -> Iterator[str]:
    for one, _, section in _sections(cls, everything=True):
        yield from (f"{one.name}.{name}" for name in _names(section)) if section else (one.name,)


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the setting whose name, or a part of whose name, is most like a misspelled one or begins with it."""
    last = name.rpartition(".")[2]

    def likeness(one: str) -> float:
        begins = len(last) > 3 and one.rpartition(".")[2].startswith(last)
        parts = max(SequenceMatcher(None, last, part).ratio() for part in one.split("."))
        return max(SequenceMatcher(None, name, one).ratio(), 0.95 * parts, 0.9 * begins)

    return max(known, key=likeness)


def _help(cls: Any, path: str = "", *, everything: bool) -> Iterator[str]:
    for one, hint, section in _sections(cls, everything=everything):
        text = " ".join(str(one.metadata.get("help", "")).split())
        if section:
            yield f"\n{path}{one.name}: {text}"
            yield from _help(section, f"{path}{one.name}.", everything=everything)
            continue
        default = one.default if one.default_factory is MISSING else one.default_factory()
        choices = f" {{{','.join(get_args(hint))}}}" if get_origin(hint) is Literal else ""
        shown = "" if default in (MISSING, None, "", [], {}) else f" (default: {default})"
        yield f"  --{path}{one.name}{choices}{shown}"
        yield from textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
