"""Messages to types and back, and the table of errors and statuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstream import errors
from logitstream.errors import REQUEST_ERRORS, InvalidSpec
from logitstream.rpc import convert
from logitstream.rpc.status import RETRYABLE, error_of, status_of, trailing_metadata
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.samplers import SAMPLERS
from logitstream.types import TargetSpec, TeacherInfo, TokenSequence


@given(
    st.sampled_from(list(SAMPLERS)),
    st.integers(1, 1 << 16),
    st.floats(2**-16, 1.0),
    st.integers(1, 1 << 24),
    st.floats(0.01, 100.0),
    st.integers(0, (1 << 64) - 1),
)
def test_a_spec_survives_the_wire(
    sampler: str, num_samples: int, threshold: float, top_k: int, temperature: float, seed: int
) -> None:
    spec = TargetSpec(
        sampler=sampler, num_samples=num_samples, threshold=threshold, top_k=top_k, temperature=temperature, seed=seed
    )
    sent = convert.spec_to_message(spec).SerializeToString()
    assert convert.spec_from_message(pb.TargetSpec.FromString(sent)) == spec


@pytest.mark.parametrize(
    ("sampler", "needed", "name"),
    [
        ("systematic", {"num_samples": 7}, "num_samples"),
        ("multinomial", {"num_samples": 7}, "num_samples"),
        ("threshold", {"threshold": 0.25}, "threshold"),
        ("top_k", {"top_k": 3}, "top_k"),
        ("top_k_ghost", {"top_k": 3}, "top_k"),
        ("full", {}, ""),
    ],
)
def test_a_spec_needs_the_fields_that_its_sampler_uses_and_no_others(
    sampler: str, needed: dict[str, Any], name: str
) -> None:
    message = pb.TargetSpec(sampler=sampler, codec_version=1, **needed)
    assert convert.spec_from_message(message) == TargetSpec(sampler=sampler, codec_version=1, **needed)
    if name:
        message.ClearField(name)  # type: ignore[arg-type]
        with pytest.raises(InvalidSpec, match=f"{name} must lie in"):
            convert.spec_from_message(message)
    for unset, text in (("codec_version", "codec_version must lie in"), ("sampler", "unknown sampler ''")):
        message = pb.TargetSpec(sampler=sampler, codec_version=1, **needed)
        message.ClearField(unset)  # type: ignore[arg-type]
        with pytest.raises(InvalidSpec, match=text):
            convert.spec_from_message(message)
    with pytest.raises(InvalidSpec, match="temperature must lie in"):
        convert.spec_from_message(pb.TargetSpec(sampler=sampler, codec_version=1, temperature=-1, **needed))


def test_equal_specs_have_one_fingerprint_whatever_kind_of_numbers_they_were_made_of() -> None:
    plain = TargetSpec(num_samples=30, temperature=2.0, seed=7)
    for other in (
        TargetSpec(num_samples=np.int64(30), temperature=2, seed=7.0),  # type: ignore[arg-type]
        TargetSpec(num_samples=30.0, temperature=np.float32(2), seed=np.uint64(7)),  # type: ignore[arg-type]
    ):
        assert json.dumps(other.canonical()) == json.dumps(plain.canonical())
    for sampler in (5, None, "x" * 1000):
        with pytest.raises(InvalidSpec, match="unknown sampler"):
            TargetSpec(sampler=sampler)  # type: ignore[arg-type]
    for name, value in (("num_samples", 30.5), ("top_k", "12"), ("temperature", None), ("seed", float("nan"))):
        with pytest.raises(InvalidSpec, match=f"{name} must"):
            TargetSpec(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "m\nWARNING all is well"),
        ("dtype", "\x1b[2Jfloat32"),
        ("backend", "b" * 2000),
        ("vocab_size", 0),
        ("max_message_bytes", 0),
        ("max_message_bytes", (64 << 20) + 1),
    ],
)
def test_what_no_teacher_says_of_itself_is_refused_by_name(field: str, value: Any) -> None:
    sizes: dict[str, Any] = dict.fromkeys(("vocab_size", "max_sequence_tokens", "max_in_flight_tokens"), 9)
    sizes["max_message_bytes"] = 99
    good = pb.DescribeResponse(model="m", weights_digest="ab", dtype="float32", **sizes)
    assert convert.info_from_message(good).model == "m"
    setattr(good, field, value)
    with pytest.raises(errors.ProtocolViolation, match=f"{field} must be at "):
        convert.info_from_message(good)


def test_what_a_teacher_says_of_itself_survives_the_wire() -> None:
    info = TeacherInfo(
        model="m",
        revision="r",
        weights_digest="ab",
        tokenizer_digest="cd",
        vocab_size=7,
        dtype="bfloat16",
        max_sequence_tokens=9,
        id_model=b"\1\2",
        teacher_version=3,
        server_version="1",
        backend="b",
    )
    sent = convert.info_to_message(info).SerializeToString()
    assert convert.info_from_message(pb.DescribeResponse.FromString(sent)) == info


def test_the_documented_example_is_what_goes_over_the_wire() -> None:
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(request .*?)```", text, re.DOTALL)
    found: dict[str, str] = {}
    last = ""
    for line in block.splitlines():
        name, digits = re.match(r"(\w{4,}|) *((?:[0-9a-f]{2} ?)+)", line).groups()
        last = name or last  # a line without a name goes on with the message before
        found[last] = found.get(last, "") + digits
    messages = {name: bytes.fromhex(digits) for name, digits in found.items()}
    sequence = TokenSequence(token_ids=np.array([5, 7, 9], np.int32))
    request = pb.ScoreRequest(
        client_id="node",
        spec=pb.TargetSpec(sampler="systematic", num_samples=5, codec_version=1),
        vocab_size=1000,
        sequences=[convert.sequence_to_message(sequence)],
    )
    format_page = (Path(__file__).parents[2] / "docs" / "targets-format.md").read_text(encoding="utf-8")
    payload = bytes.fromhex(re.findall(r"```\n([0-9a-f\s]+)```", format_page)[0])
    results = pb.ScoreResults(results=[pb.ScoreResult(index=0, targets=payload, weights_digest=b"\xfa" * 8)])
    assert messages == {"request": request.SerializeToString(), "result": results.SerializeToString()}


@given(st.lists(st.tuples(st.integers(0, (1 << 24) - 1), st.booleans()), min_size=1, max_size=100), st.booleans())
def test_a_sequence_survives_the_wire(rows: list[tuple[int, bool]], masked: bool) -> None:
    mask = np.array([wanted for _, wanted in rows]) if masked else None
    one = TokenSequence(token_ids=np.array([token_id for token_id, _ in rows], np.int32), loss_mask=mask)
    message = pb.Sequence.FromString(convert.sequence_to_message(one).SerializeToString())
    found = convert.sequence_from_message(message, vocab_size=1 << 24, max_sequence_tokens=100)
    np.testing.assert_array_equal(found.token_ids, one.token_ids)
    assert found.token_ids.dtype == np.int32
    assert found.token_ids.flags.writeable  # torch warns of arrays that are not
    assert found.digest() == one.digest()


@pytest.mark.parametrize("name", REQUEST_ERRORS)
def test_in_band_errors_keep_their_class_and_whether_another_try_may_help(name: str) -> None:
    error = REQUEST_ERRORS[name]("what came")
    found = convert.error_from_message(convert.error_to_message(error))
    assert (type(found), str(found), found.retryable) == (type(error), "what came", error.retryable)


def test_an_error_of_a_newer_server_is_still_a_request_error() -> None:
    found = convert.error_from_message(pb.RequestError(code="Unheard", message="of", retryable=True))
    assert (type(found), found.retryable) == (errors.RequestError, True)
    assert not errors.RequestError("another").retryable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.AccessDenied("x"), grpc.StatusCode.UNAUTHENTICATED),
        (errors.FingerprintMismatch("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.InvalidSpec("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.ProtocolViolation("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.ServerDraining("x"), grpc.StatusCode.UNAVAILABLE),
        (errors.TooManyInFlight("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.CodecError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_and_statuses_agree(error: errors.LogitstreamError, code: grpc.StatusCode) -> None:
    assert status_of(error) is code
    assert isinstance(error_of(code, "x"), errors.TeacherUnavailable) == (code in RETRYABLE)


def test_a_call_that_was_turned_away_says_when_to_come_again() -> None:
    error = errors.TooManyInFlight("x")
    error.retry_after_seconds = 0.25
    found = error_of(status_of(error), "x", trailing_metadata(error))
    assert isinstance(found, errors.TooManyInFlight)
    assert found.retry_after_seconds == 0.25
    draining = errors.ServerDraining("x")
    assert isinstance(error_of(status_of(draining), "x", trailing_metadata(draining)), errors.ServerDraining)
    for nonsense in ((("retry-after-ms", "soon"),), (("retry-after-ms", b"\xff"),), None):
        assert isinstance(error_of(status_of(error), "x", nonsense), errors.TeacherUnavailable)
