"""The worked examples of docs/targets-format.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from logitstream.codec import EXAMPLE as CHECKED_AT_START
from logitstream.codec import decode, encode
from tests.unit.test_codec import assert_same, targets_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "targets-format.md"
EXAMPLE = targets_of([{3: 4, 17: 1}, {}, {999: 5}], vocab_size=1000, units=5)


@pytest.mark.parametrize("version", [1, 2])
def test_the_documented_example_decodes(version: int) -> None:
    examples = re.findall(r"```\n([0-9a-f\s]+)```", DOCUMENT.read_text(encoding="utf-8"))
    payload = bytes.fromhex(examples[version - 1])
    assert payload[0] == version
    assert_same(decode(payload), EXAMPLE)
    assert encode(EXAMPLE, version=version) == payload


def test_the_table_of_version_2_is_its_example() -> None:
    """The first column's bytes, in order, are the example's, and so are those that every program checks at start."""
    assert encode(EXAMPLE) == CHECKED_AT_START
    text = DOCUMENT.read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    listed = bytes.fromhex("".join(re.findall(r"`([0-9a-f ]+)`", "".join(cells))))
    assert listed == encode(EXAMPLE)
