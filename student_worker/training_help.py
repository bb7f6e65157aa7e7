"""TrainingArguments for `--help` alone: their names, defaults and help as the source says, without importing torch."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any


def training_arguments() -> type:
    """A dataclass with the fields of transformers.TrainingArguments, all of them taken for words, lists or switches."""
    (body,) = [node.body for node in ast.parse(_source()).body if _is_class(node, "TrainingArguments")]  # type: ignore[attr-defined]
    return make_dataclass(
        "TrainingArguments", [_field(node) for node in body if isinstance(node, ast.AnnAssign) and _is_setting(node)]
    )


def _source() -> str:
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.submodule_search_locations
    return (Path(package.submodule_search_locations[0]) / "training_args.py").read_text(encoding="utf-8")


def _is_class(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


def _is_setting(node: ast.AnnAssign) -> bool:
    called = node.value.func if isinstance(node.value, ast.Call) else None
    arguments = {word.arg: word.value for word in getattr(node.value, "keywords", [])}
    is_hidden = ast.unparse(arguments.get("init", ast.Constant(True))) == "False"
    return isinstance(called, ast.Name) and called.id == "field" and not is_hidden


def _field(node: ast.AnnAssign) -> tuple[str, Any, Any]:
    assert isinstance(node.target, ast.Name)
    assert isinstance(node.value, ast.Call)
    arguments = {word.arg: word.value for word in node.value.keywords}
    annotation = ast.unparse(node.annotation)
    kind: Any = bool if annotation == "bool" else list[str] if annotation.startswith("list") else str
    return node.target.id, kind, field(default=_value(arguments.get("default")), metadata=_metadata(arguments))


def _metadata(arguments: dict[str | None, ast.expr]) -> dict[str, str]:
    written = arguments.get("metadata")
    entries = zip(written.keys, written.values, strict=True) if isinstance(written, ast.Dict) else ()
    help_text = next((_value(value) for key, value in entries if _value(key) == "help"), "")
    return {"help": str(help_text)}


def _value(node: ast.expr | None) -> Any:
    """A literal's value, else the expression as it is written; None where there is none."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
