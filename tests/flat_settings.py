"""Settings of the two commands by flat names, for tests that set a few: each is put into the section that has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from logitstream.client.connections import TeacherSettings
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.settings import build
from logitstream.types import TargetSpec
from student_worker.config import StudentConfig
from teacher_server.config import TeacherConfig


def nested(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree for `build` or a YAML file.

    `tls_cert` is tls.cert, `model` (not a mapping) the first setting of that section, `max_queue_tokens` the first of
    that name in any section, and what none has is the Trainer's.
    """
    hints = get_type_hints(cls)
    sections = {name: [one.name for one in fields(hint)] for name, hint in hints.items() if is_dataclass(hint)}
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        first, _, rest = name.partition("_")
        holders = [one for one, names in sections.items() if name in names]
        if name in hints and (name not in sections or isinstance(value, dict)):
            tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
            continue
        if name in sections:
            section, leaf = name, "source" if name == "targets" else sections[name][0]
        elif rest in sections.get(first, ()):
            section, leaf = first, rest
        else:
            section, leaf = holders[0] if holders else "training", name
        tree.setdefault(section, {})[leaf] = value
    return tree


def teacher_config(**settings: Any) -> TeacherConfig:
    """Return a teacher's settings; `model` and the address are made up unless given."""
    return build(TeacherConfig, nested(TeacherConfig, {"model": "test", "address": "127.0.0.1:0"} | settings))


def student_config(**settings: Any) -> StudentConfig:
    return build(StudentConfig, nested(StudentConfig, settings))


def teacher_client(addresses: Sequence[str], spec: TargetSpec, **settings: Any) -> GrpcTeacherClient:
    """A client of these replicas, the fields of TeacherSettings among its other settings."""
    names = {field.name for field in fields(TeacherSettings)} & settings.keys()
    teacher = TeacherSettings(addresses=list(addresses), **{name: settings.pop(name) for name in names})
    return GrpcTeacherClient(teacher, spec, **settings)
