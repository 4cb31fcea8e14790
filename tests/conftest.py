"""Shared by all tests; its being here also puts tests/ on the import path, for `tiny`."""

import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import minivlm

torch.set_num_threads(1)
# A job in a shell's background begins with Ctrl-C ignored, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Tiny:
    """One tiny checkpoint twice: loaded by minivlm, and by transformers as the oracle with its processor."""

    folder: Path
    vlm: minivlm.Pipeline
    oracle: Any
    processor: Any


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory):
    """tiny_of(kind) is that kind's `Tiny` in float32, made once a session."""

    @cache
    def make(kind: str) -> Tiny:
        folder = tiny.make_tiny(tmp_path_factory.mktemp(kind), kind)
        vlm = minivlm.load(folder, device="cpu", dtype="float32", backend="reference")
        oracle = tiny.MODELS[kind][0].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return Tiny(folder, vlm, oracle, transformers.AutoProcessor.from_pretrained(folder))

    return make
