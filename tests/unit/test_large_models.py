"""A teacher that one device cannot serve is refused with what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from logitstream.types import TargetSpec
from teacher_server.backend import ScoreRequest
from teacher_server.large_models import check_one_device, load_weights
from teacher_server.transformers_backend import TransformersBackend
from tests.tiny_models import tiny_model
from tests.unit.test_transformers_backend import INFO, ragged


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_quantised_weights_that_cannot_be_computed_with_here_point_to_vllm(tmp_path: Path, method: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"quantised by {method}.*tensor_parallel_size"):
        load_weights(tmp_path, dtype="auto", device="cpu")


def test_a_model_spread_over_devices_is_refused() -> None:
    check_one_device(SimpleNamespace(hf_device_map={"": "cuda:0"}))
    with pytest.raises(ValueError, match=r"spread over 0, cpu: .*tensor_parallel_size"):
        check_one_device(SimpleNamespace(hf_device_map={"model": 0, "lm_head": "cpu"}))


def test_out_of_memory_keeps_no_frame_of_the_failed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(tiny_model("llama"), INFO)

    def no_room(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert backend.lm is not None
    monkeypatch.setattr(backend.lm, "hidden", no_room)
    with pytest.raises(MemoryError, match="CUDA out of memory") as raised:
        backend.score([ScoreRequest(sequence=one, spec=TargetSpec()) for one in ragged([4])])
    assert raised.value.__context__ is None
