"""One trainer that trains several times: models of `model_init`, smaller batches, streams that are closed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from tests.distributed_training import Scenario, Trouble, make_model, make_trainer, teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "untied", tied=False)
    return tmp_path


def asking_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("target-stream_ask")]


def losses_of(trainer: DistillationTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_each_model_of_model_init_trains_as_one_that_was_given(folder: Path) -> None:
    """`hyperparameter_search` does no more than to change the arguments and train again, one trial after another."""
    arguments = {"max_steps": 6}
    given, init = (Scenario(name=how, student=how, stream=True, arguments=arguments) for how in ("model", "model_init"))
    with teacher(given) as wrap:
        expected = make_trainer(given, folder, [], wrap)
        expected.train()
        trainer = make_trainer(init, folder, [], wrap)
        models = [trainer.model]
        for learning_rate in (0.005, 0.001, 0.005):
            trainer.args.learning_rate = learning_rate
            trainer.create_accelerator_and_postprocess()  # as between two trials
            trainer.evaluate()
            trainer.train()
            models.append(trainer.model)
            assert asking_threads() == []
            assert (losses_of(trainer) == losses_of(expected)) == (learning_rate == 0.005)
            assert trainer.is_fused
            assert "kl" in next(row for row in trainer.state.log_history if "loss" in row), "the fused loss has run"
    assert len({id(model) for model in models}) == 4


def test_a_try_with_a_smaller_batch_closes_the_stream_of_the_one_before(folder: Path) -> None:
    shrinking = {"auto_find_batch_size": True, "step_sequences": 20, "max_steps": 6}
    scenario = Scenario(name="shrinking", out_of_memory_at=3, stream=True, num_sequences=600, arguments=shrinking)
    asking_at_start = []
    with teacher(scenario) as wrap:

        def watched(dataloader: Any) -> TargetStream:
            asking_at_start.append(asking_threads())
            stream: TargetStream = wrap(dataloader)
            return stream

        trainer = make_trainer(scenario, folder, [Trouble(scenario, cut_off=False)], watched)
        trainer.train()
    assert asking_at_start == [[], []]
    assert trainer._train_batch_size == 18
    assert asking_threads() == []
