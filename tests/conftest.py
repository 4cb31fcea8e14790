"""Shared by all tests; its being here also puts tests/ on the import path, for `tiny`."""

import os
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton makes its functions for a GPU or for its interpreter when it is imported, and torch's compiler, which
# transformers loads, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import tiny
import transformers

import minivlm

torch.set_num_threads(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="on a GPU nothing is interpreted")),
        pytest.param(
            "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
        ),
    ]
)
def device(request) -> torch.device:
    """Each test that runs a kernel runs it on each of these: in Triton's interpreter, and with `-m cuda` on a GPU."""
    return torch.device(request.param)
