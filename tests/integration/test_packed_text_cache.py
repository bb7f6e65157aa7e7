"""The datasets library keeps packed text; another version of the code makes it anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import logitstream
from tests.unit.test_data import tokenizer

PACK = """
import sys
from logitstream.data.corpus import load_sequences
from transformers import AutoTokenizer
print(load_sequences([sys.argv[1]], AutoTokenizer.from_pretrained(sys.argv[2]), sequence_tokens=2)[:]["input_ids"])
"""


def test_sequences_that_another_version_made_of_a_text_are_made_anew(tmp_path: Path) -> None:
    """The datasets library keeps them, and knows a function by its name alone."""
    (tmp_path / "a.txt").write_text("w2 w3 w4 w5")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    root = Path(logitstream.__path__[0]).parent
    shutil.copytree(root / "logitstream", tmp_path / "other" / "logitstream")
    changed = tmp_path / "other" / "logitstream" / "data" / "packing.py"
    changed.write_text(changed.read_text().replace('yield {"input_ids": ids}', 'yield {"input_ids": ids[::-1]}'))
    found = [
        subprocess.run(
            [sys.executable, "-c", PACK, str(tmp_path / "a.txt"), str(tmp_path / "tokenizer")],
            env=os.environ | {"PYTHONPATH": str(where), "HF_HOME": str(tmp_path / "home")},
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for where in (root, tmp_path / "other")
    ]
    ours, theirs = (json.loads(line) for line in found)
    assert theirs == [ids[::-1] for ids in ours]
    assert ours != theirs
