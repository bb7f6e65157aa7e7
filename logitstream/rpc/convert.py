"""Protobuf messages to the library's types and back, each checked before anything large is made of it."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from logitstream.errors import REQUEST_ERRORS, InvalidSequence, ProtocolViolation, RequestError
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.types import (
    MAX_MESSAGE_BYTES,
    TargetSpec,
    TeacherInfo,
    TokenSequence,
    pack_mask,
    unpack_mask,
    used_fields,
)

ID_BYTES = 4
MAX_TEXT_CHARS = 1024
WIRE_DIGEST_BYTES = 8
"""Bytes of the weights' digest that travel with every result."""


def spec_to_message(spec: TargetSpec) -> pb.TargetSpec:
    return pb.TargetSpec(**asdict(spec))


def spec_from_message(message: pb.TargetSpec) -> TargetSpec:
    """Return the spec. Raises InvalidSpec.

    Proto3 sends no zeros, so a zero is an unset field: what the sampler does not use may be unset, and an unset
    temperature is 1; other fields that it uses are refused by name.
    """
    used = used_fields(message.sampler)
    values: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(TargetSpec)}
    unset = {name for name, value in values.items() if not value and (name not in used or name.endswith("temperature"))}
    return TargetSpec(**{name: value for name, value in values.items() if name not in unset})


def info_to_message(info: TeacherInfo) -> pb.DescribeResponse:
    return pb.DescribeResponse(**{field.name: getattr(info, field.name) for field in fields(TeacherInfo)})


def info_from_message(message: pb.DescribeResponse) -> TeacherInfo:
    """Return the description. Raises ProtocolViolation for what no teacher says of itself.

    Its texts go to logs, files and terminals.
    """
    for name in ("model", "revision", "dtype", "server_version", "backend", "tokenizer_rules"):
        if len(text := getattr(message, name)) > MAX_TEXT_CHARS or not text.isprintable():
            raise ProtocolViolation(f"{name} must be at most {MAX_TEXT_CHARS} printable characters, got {text[:64]!r}")
    for name in ("vocab_size", "max_sequence_tokens", "max_in_flight_tokens", "max_message_bytes"):
        if getattr(message, name) < 1:
            raise ProtocolViolation(f"{name} must be at least 1, got {getattr(message, name)}")
    if message.max_message_bytes > MAX_MESSAGE_BYTES:
        raise ProtocolViolation(
            f"max_message_bytes must be at most {MAX_MESSAGE_BYTES}, which this client takes, got "
            f"{message.max_message_bytes}"
        )
    values: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(TeacherInfo)}
    return TeacherInfo(**values | {name: tuple(values[name]) for name in ("samplers", "codec_versions")})


def sequence_to_message(sequence: TokenSequence) -> pb.Sequence:
    return pb.Sequence(
        token_bytes=sequence.token_ids.astype("<i4", copy=False).tobytes(),
        loss_mask=pack_mask(sequence.loss_mask),
    )


def sequence_from_message(message: pb.Sequence, *, vocab_size: int, max_sequence_tokens: int) -> TokenSequence:
    """Return the sequence. Raises InvalidSequence, which says what was expected and what came."""
    data = message.token_bytes
    num_tokens, rest = divmod(len(data), ID_BYTES)
    if rest:
        raise InvalidSequence(f"token_bytes of {len(data)} bytes: expected {ID_BYTES} a token")
    if not 0 < num_tokens <= max_sequence_tokens:  # before anything is made of its length
        raise InvalidSequence(f"sequence of {num_tokens} tokens: expected 1 to {max_sequence_tokens}")
    token_ids = np.frombuffer(bytearray(data), "<u4")  # a copy, which may be written to
    largest = int(token_ids.max())
    if largest >= vocab_size:
        raise InvalidSequence(f"token id {largest} is outside the teacher's vocabulary of {vocab_size}")
    loss_mask = unpack_mask(message.loss_mask, num_tokens)
    return TokenSequence(token_ids=token_ids.view(np.int32), loss_mask=loss_mask)  # all are below 2^24


def error_to_message(error: RequestError) -> pb.RequestError:
    return pb.RequestError(code=type(error).__name__, message=str(error), retryable=error.retryable)


def error_from_message(message: pb.RequestError) -> RequestError:
    """Return the class that `code` names, or RequestError for a code of a newer server; `retryable` as it was sent."""
    error = REQUEST_ERRORS.get(message.code, RequestError)(message.message)
    error.retryable = message.retryable
    return error
