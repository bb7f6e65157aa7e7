"""tests/node_client, which was written in Node from the documents alone, against a server and the Python client."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstream import codec
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.rpc.tls import TlsSettings
from logitstream.tokenizer import UNCHECKED_TOKENIZER
from logitstream.types import TargetSpec, TokenSequence
from teacher_server.server import TeacherServer
from teacher_server.transformers_backend import TransformersBackend
from tests.authority import Authority
from tests.fakes import FakeBackend
from tests.serving import sequence, serving
from tests.tiny_models import VOCAB_SIZE, save_tiny_teacher

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "node_client"
TOKEN = "a-token"
SPECS: dict[str, dict[str, Any]] = {
    "systematic": {"num_samples": 5},
    "multinomial": {"num_samples": 5, "temperature": 2.0, "seed": 7},
    "threshold": {"threshold": 0.2},
    "top_k": {"top_k": 3},
    "full": {},
}
"""The fields that each sampler uses, and no others: that is all a client has to send."""


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client beside its packages, which npm fetches once for each version of package.json."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are needed to run the client")
    manifest = SOURCE / "package.json"
    kept = Path.home() / ".cache" / "logitstream" / f"node-{hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            shutil.copy(manifest, folder)
            command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
            installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
            assert installed.returncode == 0, installed.stderr
            if not kept.exists():
                os.rename(folder, kept)
                Path(folder).mkdir()  # for the context to remove
    place = tmp_path_factory.mktemp("node")
    (place / "node_modules").symlink_to(kept / "node_modules")
    shutil.copy(manifest, place)
    return Path(shutil.copy(SOURCE / "client.mjs", place))


async def run_node(client: Path, address: str, **options: Any) -> dict[str, Any]:
    arguments = json.dumps({"address": address, "protos": str(ROOT / "proto")} | options)
    process = await asyncio.create_subprocess_exec(
        "node", str(client), arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    answer: dict[str, Any] = json.loads(output)
    return answer


async def asked_in_python(
    server: TeacherServer, spec: TargetSpec, sequences: list[TokenSequence], tls: TlsSettings
) -> list[list[list[tuple[int, float]]]]:
    """Rows of (id, weight) of each sequence, as the Python client gets them."""

    def ask() -> list[bytes]:
        client = GrpcTeacherClient(
            [server.address], spec, vocab_size=VOCAB_SIZE, tokenizer=UNCHECKED_TOKENIZER, tls=tls, token=TOKEN
        )
        try:
            futures = client.submit(sequences)
            return [future.result(30).payload for future in futures]
        finally:
            client.close()

    found = []
    for payload in await asyncio.to_thread(ask):
        targets = codec.decode(payload)
        entries = list(zip(targets.token_ids.tolist(), targets.weights().tolist(), strict=True))
        found.append([entries[a:b] for a, b in zip(targets.row_offsets[:-1], targets.row_offsets[1:], strict=True)])
    return found


async def test_a_client_made_from_the_documents_gets_what_the_python_client_gets(
    node_client: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN} node\n")
    (tmp_path / "certificates").mkdir()
    files = Authority(tmp_path / "certificates").issue("server")
    tls = TlsSettings(ca=files.ca)
    backend = TransformersBackend.load(str(save_tiny_teacher(tmp_path / "model")), dtype="float32", device="cpu")
    rng = np.random.default_rng(1)
    sequences = [sequence(*rng.integers(0, VOCAB_SIZE, length)) for length in (1, 3, 40, 64, 7)]
    settings: dict[str, Any] = {
        "address": "localhost:0",
        "tls_cert": files.cert,
        "tls_key": files.key,
        "token_file": str(tmp_path / "tokens"),
        "cache": str(tmp_path / "cache"),  # so that both get the same draws bit for bit, whatever batch they are of
    }
    async with serving(backend, **settings) as server:
        assert server.scheduler is not None
        for sampler, parameters in SPECS.items():
            spec = TargetSpec(sampler=sampler, codec_version=1, **parameters)
            expected = await asked_in_python(server, spec, sequences, tls)
            stored = server.scheduler.stored
            assert stored is not None
            await stored.ask(stored.folder.refresh)
            answer = await run_node(
                node_client,
                server.address,
                ca=files.ca,
                token=TOKEN,
                spec={"sampler": sampler, "codec_version": 1} | parameters,
                sequences=[one.token_ids.tolist() for one in sequences],
            )
            assert answer.get("vocabSize") == VOCAB_SIZE, answer
            for outcome, rows in zip(answer["outcomes"], expected, strict=True):
                assert [[token_id for token_id, _ in row] for row in outcome["rows"]] == [
                    [token_id for token_id, _ in row] for row in rows
                ]
                for got, wanted in zip(outcome["rows"], rows, strict=True):
                    np.testing.assert_allclose([w for _, w in got], [w for _, w in wanted], rtol=1e-6)


async def test_a_client_made_from_the_documents_is_told_what_is_wrong(node_client: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    asked: dict[str, Any] = {
        "spec": {"sampler": "systematic", "num_samples": 5, "codec_version": 1},
        "sequences": [[1, 2, 3], [1000], [4, 5]],
    }
    async with serving(FakeBackend(), token_file=str(tmp_path / "tokens")) as server:
        for token in ("", "another"):
            answer = await run_node(node_client, server.address, token=token, **asked)
            assert (answer["status"], "bearer token" in answer["details"]) == (16, True)
        answer = await run_node(node_client, server.address, token=TOKEN, **asked)
        assert [len(outcome.get("rows", [])) for outcome in answer["outcomes"]] == [3, 0, 2]
        error = answer["outcomes"][1]["error"]
        assert (error["code"], error["retryable"]) == ("InvalidSequence", False)
        assert "1000 is outside the teacher's vocabulary of 1000" in error["message"]
        asked["spec"].pop("num_samples")
        answer = await run_node(node_client, server.address, token=TOKEN, **asked)
        assert answer["status"] == 3
        assert answer["details"].startswith("num_samples must lie in")
