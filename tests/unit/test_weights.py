"""The digest of weights tells apart everything that changes logits, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from logitstream.files import naming
from teacher_server.weights import digest_with_options, weights_digest, weights_folder

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


@pytest.mark.parametrize("beside", [[], ["model.safetensors", "config.json"]], ids=["alone", "beside full weights"])
def test_an_adapter_is_refused_with_the_command_that_merges_it(tmp_path: Path, beside: list[str]) -> None:
    for name in ("adapter_model.safetensors", *beside):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"holds an adapter, .*Merge it.*python -c .*merge_and_unload\(\)"):
        weights_folder(str(tmp_path), "main")


def test_a_model_whose_index_names_missing_shards_is_refused(tmp_path: Path) -> None:
    digest_of(tmp_path, CONFIG)
    assert weights_folder(str(tmp_path), "main") == tmp_path
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names 1 files that are not there: model-00002-of-00002\.safetensors"):
        weights_folder(str(tmp_path), "main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/folder", "model no/folder: offline"),
        ("/no/folder", "model: there is no folder /no/folder"),
        (str(Path(__file__).parent), f"model {Path(__file__).parent}: offline"),
    ],
)
def test_what_cannot_be_loaded_is_named_whatever_the_libraries_say(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), naming("model", name):
        raise OSError("offline")
