"""Imported last by the process that others are forked from: what every start would do again is done here once."""

from __future__ import annotations

import gc
import logging
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import student_worker.run  # noqa: F401  # the command itself imports it once it has read its settings
from logitstream import codec
from tests.tiny_models import save_tiny_teacher

torch.set_num_threads(1)  # no other thread may be there when a process is forked
codec.warm_up()
with tempfile.TemporaryDirectory() as folder:
    save_tiny_teacher(folder)  # type: ignore[arg-type]
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
logging.getLogger().handlers.clear()
gc.collect()
gc.freeze()  # a collection in a forked process would copy all of this
