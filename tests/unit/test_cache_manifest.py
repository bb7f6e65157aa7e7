"""Whatever a manifest holds, opening the cache raises CacheError or FingerprintMismatch alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.manifest import FORMAT, create_manifest, render
from logitstream.cache.tools.rewrite import prune
from logitstream.cache.tools.verify import describe, verify
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.types import Fingerprint
from tests.unit.test_cache import fingerprint, make_records, put_all

KNOWN = fingerprint()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with CacheWriter(folder, KNOWN) as writer:
        put_all(writer, make_records(5))
    return folder


def signed(content: dict[str, Any]) -> bytes:
    """A manifest whose own digests agree, so that nothing but its content can be objected to."""
    found = content.get("fingerprint")
    try:
        digest = Fingerprint(**found).digest  # type: ignore[arg-type]
    except (TypeError, AttributeError):
        digest = KNOWN.digest
    return render(content | ({"fingerprint_digest": digest} if "fingerprint_digest" in content else {}))


def opens(directory: Path) -> bool:
    """Tell whether the cache opens; any other error than the two expected ones is raised."""
    whole = True
    for use in (
        lambda: CacheReader(directory),
        lambda: CacheReader(directory, KNOWN),
        lambda: CacheWriter(directory, KNOWN).close(),
        lambda: describe(CacheReader(directory)),
        lambda: prune(directory, before_draw_set=0),
    ):
        try:
            use()
        except (CacheError, FingerprintMismatch):
            whole = False
    verify(directory)
    return whole


def whole_manifest(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
    del found["sha256_of_the_rest"]
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_any_field_replaced_or_missing_is_refused_in_words(
    data: st.DataObject, directory: Path
) -> None:
    original = (directory / "manifest.json").read_bytes()
    content = whole_manifest(directory)
    within = data.draw(st.sampled_from([content, content["fingerprint"], content["fingerprint"]["spec"]]))
    name = data.draw(st.sampled_from(sorted(within)) | st.text(max_size=5))
    if data.draw(st.booleans()):
        within.pop(name, None)
    else:
        within[name] = data.draw(JSON)
    (directory / "manifest.json").write_bytes(signed(content))
    try:
        opens(directory)
    finally:
        (directory / "manifest.json").write_bytes(original)


NESTED = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
MALFORMED = {
    "empty": b"",
    "deep object": NESTED,
    "deep list": b"[" * 100_000,
    "no object": b"[1, 2]",
    "number": b"1" * 10_000,
    "not UTF-8": b"\xff\xfe\x00",
    "NaN": render({"format": FORMAT}).replace(b'"logitstream-cache/3"', b"NaN"),
    "UTF-16": json.dumps({"format": FORMAT}).encode("utf-16"),
    "huge number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_manifest_is_a_cache_error(directory: Path, kind: str) -> None:
    original = (directory / "manifest.json").read_bytes()
    (directory / "manifest.json").write_bytes(MALFORMED[kind])
    try:
        assert not opens(directory)
        with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
            CacheReader(directory)
    finally:
        (directory / "manifest.json").write_bytes(original)
    assert opens(directory)


def test_a_deep_provenance_is_refused_whether_it_is_written_or_read(tmp_path: Path) -> None:
    deep: Any = "end"
    for _ in range(600):
        deep = {"within": deep}
    text = json.dumps(deep)
    create_manifest(tmp_path, KNOWN, provenance={})
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"provenance": {}', b'"provenance": ' + text.encode()))
    with pytest.raises(CacheError, match="damaged"):
        CacheReader(tmp_path)


@pytest.mark.parametrize("twice", ['"vocab_size": 7', '"dtype": "bfloat16"'])
def test_a_name_that_stands_twice_is_refused(directory: Path, twice: str) -> None:
    original = (directory / "manifest.json").read_bytes()
    (directory / "manifest.json").write_bytes(
        original.replace(b'"fingerprint": {', f'"fingerprint": {{ {twice},'.encode())
    )
    try:
        with pytest.raises(CacheError, match="damaged"):
            CacheReader(directory)
    finally:
        (directory / "manifest.json").write_bytes(original)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("vocab_size", value) for value in (0, -1, 1 << 60, 1000.0, True)],
        *[("dtype", 5), ("weights_digest", None), ("spec", []), ("spec", {"seed": {}}), ("spec", {"seed": True})],
    ],
)
def test_a_fingerprint_of_impossible_values_is_refused(directory: Path, name: str, value: Any) -> None:
    original = (directory / "manifest.json").read_bytes()
    content = whole_manifest(directory)
    content["fingerprint"] = asdict(KNOWN) | {name: value}
    (directory / "manifest.json").write_bytes(signed(content))
    try:
        with pytest.raises(CacheError, match="holds no fingerprint of ours: "):
            CacheReader(directory)
    finally:
        (directory / "manifest.json").write_bytes(original)
