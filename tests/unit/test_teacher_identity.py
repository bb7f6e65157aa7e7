from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from logitstream.client.teacher_identity import OwnTokenizer, TeacherIdentity, teacher_differences
from logitstream.errors import FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo
from tests.fake_teacher import SPEC, TOKENIZER_DIGEST, fake_info


def identity(**settings: Any) -> TeacherIdentity:
    return TeacherIdentity(SPEC, vocab_size=1000, tokenizer=OwnTokenizer(TOKENIZER_DIGEST), **settings)


def digest_of(info: TeacherInfo) -> bytes:
    return bytes.fromhex(info.weights_digest)[:8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "cd" * 32}, "weights_digest: '.*' against 'cdcd"),
        ({"weights_digest": "no hex"}, "describes itself as no teacher can: weights_digest must match"),
        ({"tokenizer_digest": "cd" * 32}, "tokenizers differ"),
        ({"dtype": "../../etc"}, "describes itself as no teacher can: dtype must match"),
        ({"vocab_size": 0}, "describes itself as no teacher can: vocab_size must be a whole number"),
        ({"vocab_size": 1001}, "student's vocabulary of 1000, the teacher's has 1001"),
        ({"vocab_size": 999}, "vocab_size: 1000 against 999"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' against 'bfloat16'"),
        ({"id_model": b"another"}, "id_model_digest: '' against '"),
        ({"samplers": ("top_k",)}, "expected sampler systematic .* the teacher offers top_k"),
        ({"codec_versions": (2,)}, "codec version 1, the teacher offers .* versions 2"),
    ],
)
def test_a_replica_that_differs_is_refused_with_the_difference(change: dict[str, object], message: str) -> None:
    teacher = identity()
    teacher.accept("first", fake_info())
    with pytest.raises(FingerprintMismatch, match=message):
        teacher.accept("second", replace(fake_info(), **change))  # type: ignore[arg-type]
    assert teacher.info == fake_info()


def test_an_expected_fingerprint_decides_before_the_first_replica() -> None:
    teacher = identity(fingerprint=Fingerprint.of(fake_info(weights="other"), SPEC))
    with pytest.raises(FingerprintMismatch, match="weights_digest"):
        teacher.accept("first", fake_info())
    teacher = identity(fingerprint=Fingerprint.of(fake_info(), TargetSpec(num_samples=9, codec_version=1)))
    with pytest.raises(FingerprintMismatch, match=r"'num_samples': 9.*'num_samples': 8"):
        teacher.accept("first", fake_info())


def test_while_the_teacher_learns_only_its_weights_may_change() -> None:
    teacher = identity(max_teacher_lag=3)
    for version in range(3):
        teacher.accept("first", fake_info(version=version))
    digests = [digest_of(fake_info(version=version)) for version in range(3)]
    found = [teacher.fingerprint_digest(digest) for digest in digests]
    assert found == [Fingerprint.of(fake_info(version=version), SPEC).digest for version in range(3)]
    with pytest.raises(FingerprintMismatch, match="dtype"):
        teacher.accept("first", replace(fake_info(version=3), dtype="bfloat16"))
    assert teacher.caller(fake_info()).weights_digest == ""


def test_lag_counts_from_the_newest_version_that_is_served() -> None:
    teacher = identity(max_teacher_lag=2)
    infos = [fake_info(version=version) for version in (1, 2, 6)]
    for info in infos:
        teacher.accept("learns", info)
        teacher.accept("stays", infos[0])
    assert [teacher.lag(digest_of(info)) for info in infos] == [5, 4, 0]
    assert [teacher.is_stale(digest_of(info)) for info in infos] == [True, True, False]
    assert teacher.info == infos[2]
    teacher.left("learns")
    assert not teacher.is_stale(digest_of(infos[0]))
    assert teacher.is_stale(b"unheard")


def test_the_same_weights_are_never_stale_whatever_a_replica_counts_them_as() -> None:
    teacher = identity(max_teacher_lag=1)
    newest = fake_info(version=7)
    teacher.accept("long up", newest)
    teacher.accept("just started", replace(newest, teacher_version=1))
    assert teacher.lag(digest_of(newest)) == 0


def test_a_server_that_starts_again_and_counts_from_zero_is_not_stale() -> None:
    teacher = identity(max_teacher_lag=1)
    teacher.accept("only one", fake_info(version=7))
    teacher.left("only one")
    restarted = fake_info(weights="newer", version=0)
    teacher.accept("only one", restarted)
    assert not teacher.is_stale(digest_of(restarted))
    assert teacher.info == restarted


def test_a_server_that_starts_again_beside_others_is_as_old_as_its_weights_whatever_it_counts() -> None:
    """`long up` has replaced its weights ten times; `restarted` loads the eleventh before it does."""
    teacher = identity(max_teacher_lag=2)
    tenth, eleventh = fake_info(version=10), fake_info(version=11)
    teacher.accept("long up", tenth)
    teacher.accept("restarted", fake_info(weights="what it was started with"))
    assert teacher.lag(digest_of(fake_info(weights="what it was started with"))) == 10
    teacher.accept("restarted", replace(eleventh, teacher_version=1))
    assert (teacher.lag(digest_of(tenth)), teacher.lag(digest_of(eleventh))) == (1, 0)
    teacher.accept("long up", eleventh)
    teacher.accept("long up", fake_info(version=12))
    assert (teacher.lag(digest_of(tenth)), teacher.lag(digest_of(eleventh))) == (2, 1)


def test_a_replica_describes_itself_again_for_later_weights_only() -> None:
    teacher = identity(max_teacher_lag=2)
    old, new = fake_info(version=1), fake_info(version=2)
    teacher.accept("first", old)
    teacher.accept("second", old)
    assert teacher.is_news(digest_of(new), digest_of(old))
    teacher.accept("first", new)
    assert teacher.is_news(digest_of(new), digest_of(old))
    assert not teacher.is_news(digest_of(old), digest_of(new))
    assert not teacher.is_news(digest_of(new), digest_of(new))


def test_any_version_is_taken_where_asked_to() -> None:
    teacher = identity(max_teacher_lag=-1)
    teacher.accept("old", fake_info(version=0))
    teacher.accept("old", fake_info(version=90))
    assert not teacher.is_stale(digest_of(fake_info(version=0)))


def test_the_difference_names_the_replica_that_decided() -> None:
    teacher = identity()
    assert not teacher.is_named
    teacher.accept("10.0.0.1:1", fake_info())
    with pytest.raises(FingerprintMismatch, match=r"\(10.0.0.1:1's value first\): weights_digest"):
        teacher.accept("10.0.0.2:1", fake_info(weights="b"))
    named = identity(fingerprint=Fingerprint.of(fake_info(), SPEC))
    assert named.is_named
    with pytest.raises(FingerprintMismatch, match=r"\(its value first\): weights_digest"):
        named.accept("10.0.0.2:1", fake_info(weights="b"))


def test_two_finds_of_a_teacher_differ_in_weights_only_where_it_does_not_learn() -> None:
    ours, newer = (Fingerprint.of(fake_info(version=version), SPEC) for version in range(2))
    assert "weights_digest" in teacher_differences(ours, newer, max_teacher_lag=0)
    assert teacher_differences(ours, newer, max_teacher_lag=-1) == ""
    assert "dtype" in teacher_differences(ours, replace(newer, dtype="bfloat16"), max_teacher_lag=3)
