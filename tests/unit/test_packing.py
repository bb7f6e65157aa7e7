"""Packed ids are the tokenizer's of the whole document, window by window, for the kinds of tokenizers there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from logitstream.data.corpus import load_sequences
from logitstream.data.packing import Frame, document_ids, frame_of
from tests.tokenizer_kinds import TEXTS, tokenizers

KINDS = [
    "gpt2",
    "qwen2",
    "llama3",
    "metaspace_always",
    "metaspace_first",
    "metaspace_never",
    "byte_fallback",
    "wordpiece",
    "strip",
    "t5",
]


@pytest.fixture(scope="module")
def kinds() -> dict[str, PreTrainedTokenizerFast]:
    return tokenizers()


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def windowed(tokenizer: Any, text: str, window_chars: int, overlap_chars: int) -> list[int]:
    parts = document_ids(text, tokenizer, window_chars=window_chars, overlap_chars=overlap_chars)
    return [token for part in parts for token in part]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_text_file_has_the_ids_of_the_whole_document(
    tmp_path: Path, kinds: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    for name in ("demo", "others"):
        file = tmp_path / f"{name}.txt"
        file.write_text(TEXTS[name], newline="")
        expected = whole(kinds[kind], file.read_text())
        packed = load_sequences([str(file)], kinds[kind], sequence_tokens=64, document_end="none")
        assert np.concatenate(packed["input_ids"]).tolist() == expected[: len(expected) // 64 * 64], name


@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_the_ids_of_the_whole_document(kinds: dict[str, PreTrainedTokenizerFast], kind: str) -> None:
    for name, text in TEXTS.items():
        assert windowed(kinds[kind], text, 3000, 400) == whole(kinds[kind], text), name


PIECES = [
    "a",
    "word",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "'s",
    "1",
    "2345",
    "é",
    "日",
    "🙂",
    ".",
    "...",
    "\r\n",
    " x",
    "▁",
    "<end>",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=400), kind=st.sampled_from(KINDS))
def test_windows_do_not_show_in_the_ids_of_any_text(
    kinds: dict[str, PreTrainedTokenizerFast], pieces: list[str], kind: str
) -> None:
    text = "".join(pieces)
    assert windowed(kinds[kind], text, 150, 100) == whole(kinds[kind], text)


def test_the_middle_of_a_long_text_is_tokenized_about_once(kinds: dict[str, PreTrainedTokenizerFast]) -> None:
    """Ordinary text is; text that no window can be cut in is read in ever larger ones, not over and over."""
    seen: list[int] = []

    class Counting:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return kinds["gpt2"](text, **options)

    text = TEXTS["prose"] * 8
    assert windowed(Counting(), text, 8000, 400) == whole(kinds["gpt2"], text)
    assert sum(seen) < 1.2 * len(text)
    assert max(seen) < 9000
    seen.clear()
    text = "7" * 200_000
    assert windowed(Counting(), text, 8000, 400) == whole(kinds["gpt2"], text)
    assert sum(seen) < 5 * len(text)


class WithoutOffsets:
    is_fast = False

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(text)]}


def test_a_tokenizer_without_offsets_gets_the_whole_document() -> None:
    assert windowed(WithoutOffsets(), "x" * 5000, 100, 10) == [5000]


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b"one\r\n\r\ntwo\r\n", "one\n\ntwo\n"),
        (b"\xef\xbb\xbfone", "one"),
        (b"one\n\ntwo", "one\n\ntwo"),
        (b"  one\n\n\n\n two  \n\n", "  one\n\n\n\n two  \n\n"),
        (b"one\x00two\x0cthree\x1c", "one\x00two\x0cthree\x1c"),
    ],
)
def test_a_text_file_is_read_as_it_is(
    tmp_path: Path, kinds: dict[str, PreTrainedTokenizerFast], content: bytes, read: str
) -> None:
    (tmp_path / "a.md").write_bytes(content)
    (tmp_path / "empty.txt").touch()
    files = [str(tmp_path / name) for name in ("empty.txt", "a.md")]
    packed = load_sequences(files, kinds["gpt2"], sequence_tokens=1, document_end="none")
    assert [ids[0] for ids in packed["input_ids"]] == whole(kinds["gpt2"], read)


def test_a_file_that_changes_is_read_again_and_one_in_another_encoding_is_named(
    tmp_path: Path, kinds: dict[str, PreTrainedTokenizerFast]
) -> None:
    file = tmp_path / "a.txt"
    for text in ("one two", "two one!"):
        file.write_text(text)
        packed = load_sequences([str(file)], kinds["gpt2"], sequence_tokens=1, document_end="none")
        assert [ids[0] for ids in packed["input_ids"]] == whole(kinds["gpt2"], text)
    file.write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt: expected rows in text, got something else \(.*utf-8"):
        load_sequences([str(file)], kinds["gpt2"], sequence_tokens=1)


def chat_tokenizer(kinds: dict[str, PreTrainedTokenizerFast], *, template: str) -> PreTrainedTokenizerFast:
    """One whose end of turn is its eos_token, and whose post-processor puts tokens around a text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(kinds["gpt2"].backend_tokenizer).from_str(kinds["gpt2"].backend_tokenizer.to_str()),
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "<bos> $A <|im_end|>"])
def test_documents_get_what_the_tokenizer_puts_around_them_and_the_end_of_text_of_pretraining(
    tmp_path: Path, kinds: dict[str, PreTrainedTokenizerFast], caplog: pytest.LogCaptureFixture, template: str
) -> None:
    tokenizer = chat_tokenizer(kinds, template=template)
    documents = ["The first one.\n\nIts second part.", "", "The last."]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    (tmp_path / "b.txt").write_text(documents[0])
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    with caplog.at_level("INFO"):
        packed = [ids[0] for ids in load_sequences(files, tokenizer, sequence_tokens=1)["input_ids"]]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert packed == [token for text in [*documents, documents[0]] for token in [*tokenizer(text)["input_ids"], end]]
    around = template.replace(" ", "").replace("$A", "text") + "<|endoftext|>"
    assert f"each document is packed as {around} (document_start: auto, document_end: auto)" in caplog.text


def test_the_end_of_text_is_not_put_twice(kinds: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = chat_tokenizer(kinds, template="$A <bos>")
    tokenizer.eos_token = "<bos>"
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    end: Any = tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    assert frame_of(tokenizer) == Frame((), (end,))


def test_settings_name_other_tokens_or_none_around_documents(kinds: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = chat_tokenizer(kinds, template="<bos> $A <|im_end|>")
    ids: Any = [tokenizer.convert_tokens_to_ids(name) for name in ("<bos>", "<|im_end|>", "<|endoftext|>")]
    bos, turn, text = ids
    assert frame_of(tokenizer, start="none", end="none") == Frame()
    assert frame_of(tokenizer, start="<|endoftext|>", end="<|im_end|>") == Frame((text,), (turn,))
    assert frame_of(tokenizer) == Frame((bos,), (turn, text))
    with pytest.raises(ValueError, match=r"document_end: expected auto, none or one of .* tokens, got '<x>'"):
        frame_of(tokenizer, end="<x>")


def test_long_documents_among_short_ones_keep_their_place(kinds: dict[str, PreTrainedTokenizerFast]) -> None:
    from logitstream.data import packing
    from logitstream.data.student_limits import StudentLimits

    texts = ["short", TEXTS["prose"] * 20, "", "another", "x" * 200_000, "last"]
    assert len(texts[1]) > packing.WINDOW_CHARS
    rows = packing.pack(
        (Dataset.from_dict({"text": texts}),), "text", kinds["gpt2"], 1, Frame((0,), (1,)), StudentLimits(vocab_size=0)
    )
    expected = [token for text in texts for token in [0, *whole(kinds["gpt2"], text), 1]]
    assert [int(row["input_ids"][0]) for row in rows] == expected
