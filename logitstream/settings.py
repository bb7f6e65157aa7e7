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
from inspect import formatannotation
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
Tree = dict[str, Any]
NULL = ("", "~", "null")
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class SettingsError(ValueError):
    """A setting that does not exist, has a value of another type, or is refused."""


class Text(str):
    """A name or value as it is spelled; `where` is the file and line it comes from, empty for the command line."""

    where = ""


class Words(list[Any]):
    """The words after an option on the command line: a list, or the value itself if it is one word."""


def setting(
    help_text: str, default: Any = MISSING, *, factory: Any = MISSING, later: Callable[[], type] | None = None
) -> Any:
    """Return a dataclass field with its sentence of help.

    later: imports the dataclass of a section that is slow to import; `parse` leaves the section as texts by name.
    """
    metadata = {"help": help_text, "later": later}
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
    tree = {} if file is None else _read_yaml(Path("".join(file)))
    for name, values in given.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            inner = node.get(section) or {}  # the file may name a section and say nothing of it
            if not isinstance(inner, dict):
                raise SettingsError(f"--{name}: a value was given to {section} before")
            node[section] = inner
            node = inner
        node[last] = values
    return build(cls, tree)


def build(cls: type[T], tree: Mapping[str, Any], path: str = "", root: type | None = None) -> T:
    """Return an instance of a dataclass from texts or values by name, sections as mappings. Raises SettingsError."""
    known, hints = {one.name: one for one in fields(cls) if one.init}, get_type_hints(cls)  # type: ignore[arg-type]
    values: Tree = {}
    for name, value in tree.items():
        if name not in known:
            everything = _walk(root or cls, "" if root else path, everything=True)
            near = _nearest(path + name, [one for one, _, _, is_section in everything if not is_section])
            place = getattr(name, "where", "")
            where = f"in {place}" if place else "on the command line"
            raise SettingsError(f"unknown setting '{path}{name}' {where}; did you mean '{near}'?")
        is_later = known[name].metadata.get("later")
        values[name] = value if is_later else _convert(hints[name], value, path + name, root or cls)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        named = [value for name, value in tree.items() if name in re.findall(r"\w+", str(error))]
        raise SettingsError(f"{_place(*named[:1])}{path and path[:-1] + ': '}{error}") from error


def _origin(hint: Any) -> Any:
    return get_origin(hint) or hint


def _convert(hint: Any, value: Any, path: str, root: type) -> Any:
    """Return the value that a type makes of a text, a list or a mapping. Raises SettingsError: expected, came."""
    if isinstance(value, Words) and len(value) == 1:
        (value,) = value
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    last = {str: 1, list: 2}  # any text is a str, and any word a list of one
    for kind in sorted(kinds, key=lambda one: last.get(_origin(one), 0)):
        try:
            return _as(kind, value, path, root)
        except SettingsError:
            if len(kinds) == 1:
                raise
        except (ValueError, TypeError, LookupError):
            pass
    expected = f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else formatannotation(hint)
    raise SettingsError(f"{_place(value)}{path}: expected {expected}, got {_plain(value)!r}")


def _as(kind: Any, value: Any, path: str, root: type) -> Any:
    """Return the value of one kind, not a union; raise ValueError, TypeError or LookupError if it is of another."""
    origin, parts = _origin(kind), get_args(kind)
    text, is_null = str(value).lower(), value is None or str(value).lower() in NULL
    if origin is NoneType and is_null:
        return None
    if is_dataclass(origin) and (is_null or isinstance(value, dict)):
        return build(kind, {} if is_null else value, f"{path}.", root)
    if origin is Any:
        return _plain(value)
    if origin is Literal:
        return parts[parts.index(str(value))]
    if origin is list and not isinstance(value, dict):
        items = value if isinstance(value, list) else [value]
        return [_convert(parts[0] if parts else Any, one, path, root) for one in items]
    if origin is dict:
        pairs = dict(value if isinstance(value, dict) else json.loads(value))
        return {str(key): _convert(parts[1] if parts else Any, one, path, root) for key, one in pairs.items()}
    if origin is bool:
        return value == [] or SWITCH[text]  # [] is an option without a value
    if isinstance(value, list | dict):
        raise TypeError("expected one word")
    return kind(re.sub(r"^(-?)\.(inf|nan)$", r"\1\2", str(value)))  # as YAML spells them


def _place(*values: Any) -> str:
    return "".join(f"{one.where}: " for one in values if getattr(one, "where", ""))


def _plain(value: Any) -> Any:
    """Return what YAML makes of texts whose type is not known."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return yaml.safe_load(value) if isinstance(value, Text) else value


def _read_words(words: Sequence[str]) -> dict[str, Words]:
    """Return the words after each `--section.name`, by that name."""
    found: dict[str, Words] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            name = option.replace("-", "_")
            found[name] = Words([Text(value)] if equals else [])
        elif not name:
            raise SettingsError(f"expected --section.name VALUE, got {word!r}")
        else:
            found[name].append(Text(word))
    return found


class _Loader(yaml.BaseLoader):
    """Keeps values as they are spelled (the setting's type decides what `no` and 1e-3 are), with their lines."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Text:
        text = Text(node.value)
        text.where = f"{self.name}, line {node.start_mark.line + 1}"
        return text


def _read_yaml(path: Path) -> Tree:
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)  # builds texts, lists and mappings alone
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise SettingsError(f"{path} must hold `name: value` pairs, got {tree!r}")
    return tree or {}


def _walk(cls: Any, path: str = "", *, everything: bool = False) -> Iterator[tuple[str, Field[Any], Any, bool]]:
    """Yield each setting's full name, field and type, and whether it is a section, whose settings follow."""
    hints = get_type_hints(cls)
    for one in fields(cls):
        later, hint = one.metadata.get("later"), hints[one.name]
        section = hint if is_dataclass(hint) else later() if later and everything else None
        if one.init:
            yield f"{path}{one.name}", one, hint, section is not None
        if section is not None:
            yield from _walk(section, f"{path}{one.name}.", everything=everything)


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the setting whose name, or a part of whose name, is most like a misspelled one or begins with it."""
    last = name.rpartition(".")[2]

    def likeness(one: str) -> float:
        ratios = [SequenceMatcher(None, last, part).ratio() for part in one.split(".")]
        begins = len(last) > 3 and one.rpartition(".")[2].startswith(last)
        return max(SequenceMatcher(None, name, one).ratio(), 0.95 * max(ratios), 0.9 * begins)

    return max(known, key=likeness)


def _help(cls: Any, *, everything: bool) -> Iterator[str]:
    for name, one, hint, is_section in _walk(cls, everything=everything):
        text = " ".join(str(one.metadata.get("help", "")).split())
        if is_section:
            yield f"\n{name}: {text}"
            continue
        default = one.default if one.default_factory is MISSING else one.default_factory()
        choices = f" {{{','.join(get_args(hint))}}}" if get_origin(hint) is Literal else ""
        shown = "" if default in (MISSING, None, "", [], {}) else f" (default: {default})"
        yield f"  --{name}{choices}{shown}"
        yield from textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
