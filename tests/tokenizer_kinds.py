"""Tokenizers of the kinds that models have, trained on a little text; and text that tells them apart."""

from __future__ import annotations

import inspect
import itertools
import json
from pydoc_data.topics import topics

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN2 = rf"{CONTRACTIONS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

FRENCH = (
    "Le soir tombait sur la vallée ; les dernières charrettes rentraient au village.\n\n"
    "« Où étais-tu ? » demanda-t-elle. L'été, 37 °C à l'ombre, 1 250 pas jusqu'à la gare…\n"
    "    – Déjà parti, là-bas, vers l'œuvre d'un naïf.\n\n\n"
)
GERMAN = (
    "Über den Dächern hing ein grauer Morgen, und die Straßenbahnschaffner fröstelten.\n\n"
    "»Wie viele?«, fragte der Müller. 12.345 Säcke Mehl, größtenteils Übergröße …\n"
    "\t1. Rechtsschutzversicherungsgesellschaften\n \n"
)
PROSE = (
    " It wasn't late.  The ferryman had counted 1234567 planks, he'd say, and still the river rose.\n\n"
    "'Tis said they'll come back at 10:45; nobody's sure...\n\n\n\n  An indented line,\ttabs\t\tand blanks   \n"
)
OTHERS = "日本語の文章。\n\n한국어 문장 🙂🙃 e\u0301 \u00a0 x\u200b\u3000y\r z\x00\n\n"


def varied(text: str, repeats: int) -> str:
    """A long text with other numbers and blanks in each repetition, so that no place looks like another."""
    return "".join(text.replace("1", str(i * 7919)) + "\n" * (i % 4) + " " * (i % 5) for i in range(repeats))


TEXTS = {
    "demo": "\n\n".join(itertools.islice((topics[name] for name in sorted(topics)), 12)),
    "prose": varied(PROSE, 120),
    "code": inspect.getsource(json.decoder) + inspect.getsource(inspect)[:20_000],
    "french": varied(FRENCH, 110),
    "german": varied(GERMAN, 110),
    "blank start": " \n" * 4500 + varied(PROSE, 60) + "\n" * 5000 + varied(GERMAN, 30) + " " * 4000,
    "others": varied(OTHERS, 300) + " " * 3000 + "7" * 2500 + "\n" * 700 + "=" * 1500,
}


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """By kind: byte-level regexes of GPT-2, Qwen2 and Llama 3, SentencePiece's prefix spaces, byte fallback, BERT's.

    `strip` and `t5` take blanks from a text's ends.
    """
    return {
        "gpt2": _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "qwen2": _byte_level(_split(QWEN2), normalizers.NFC()),
        "llama3": _byte_level(_split(LLAMA3)),
        **{f"metaspace_{scheme}": _metaspace(scheme) for scheme in ("always", "first", "never")},
        "byte_fallback": _byte_fallback(),
        "wordpiece": _wordpiece(),
        "strip": _byte_level(_split(QWEN2), normalizers.Strip()),
        "t5": _metaspace(
            "always",
            normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]),
        ),
    }


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(
    splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = splitter
    if normalizer is not None:
        made.normalizer = normalizer
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(made, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    return _fast(made)


def _metaspace(scheme: str, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _train(made, trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", show_progress=False))
    return _fast(made, unk_token="<unk>")


def _byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: no pre-tokenizer, so the whole text is one word to merge in."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    _train(
        made, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    )
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fast(made, unk_token="<unk>", eos_token="</s>")


def _wordpiece() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _train(made, trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False))
    return _fast(made, unk_token="[UNK]")


def _train(made: Tokenizer, trainer: trainers.Trainer) -> None:
    """On a part of the texts: what is left has characters and words that the tokenizer does not know."""
    made.train_from_iterator([text[:6000] for name, text in TEXTS.items() if name != "others"], trainer)


def _fast(made: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, **({"eos_token": "<end>"} | tokens))
