"""What the digest of weights tells apart: everything that changes logits, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teacher_server.weights import digest_with_options, weights_digest

CONFIG = {"rope_scaling": {"factor": 4.0}, "text_config": {"final_logit_softcapping": 30.0}}


def digest_of(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return weights_digest(folder)


@pytest.mark.parametrize(
    "changed", [{"rope_scaling": {"factor": 8.0}}, {"text_config": {}}, {"quantization_config": {"bits": 4}}]
)
def test_a_setting_of_the_model_is_part_of_the_digest(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert digest_of(tmp_path / "a", CONFIG) != digest_of(tmp_path / "b", CONFIG | changed)


def test_what_changes_no_logit_and_how_the_config_is_written_is_not(tmp_path: Path) -> None:
    noise = {"transformers_version": "9", "_name_or_path": "x", "torch_dtype": "float16", "use_cache": False}
    noisy = dict(reversed(CONFIG.items())) | noise | {"text_config": CONFIG["text_config"] | {"dtype": "bfloat16"}}
    assert digest_of(tmp_path / "a", CONFIG) == digest_of(tmp_path / "b", noisy)


def test_engine_options_count_but_for_those_of_speed_and_memory() -> None:
    plain = digest_with_options("ab", {})
    assert plain == digest_with_options("ab", {"max_num_seqs": 8, "tensor_parallel_size": 2}) == "ab"
    served = [
        digest_with_options("ab", options)
        for options in ({"quantization": "fp8"}, {"quantization": "awq"}, {"hf_overrides": {"rope_theta": 1}}, {})
    ]
    assert len(set(served)) == 4
    assert digest_with_options("ab", {"quantization": "fp8", "max_num_seqs": 8}) == served[0]
