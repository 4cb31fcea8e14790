"""Which models are small, and what that does to the threads of the process."""

import subprocess
import sys

import pytest
import torch

import minivlm
from minivlm.ops import cpu_threads

HELD = {"stored": 6_600_000, "int8": 3_300_000, "int4": 1_800_000}  # bytes of the shipped checkpoint's decoder
GENERATE = """
import torch
from minivlm import cli
torch.set_num_threads(2)
print(torch.get_num_threads())
assert cli.main(["generate", "--max-new-tokens", "2"]) == 0
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("weights", HELD)
def test_the_bound_is_on_all_weights_whatever_they_are_kept_in(weights, monkeypatch):
    decoder = minivlm.load(device="cpu", weights=weights).model.language_model
    for bound, expected in ((1.2 * HELD[weights], True), (HELD[weights] / 1.5, False)):
        monkeypatch.setattr(cpu_threads, "CACHED", bound)
        assert cpu_threads.small(decoder) is expected


def test_what_lies_elsewhere_is_not_small():
    assert not cpu_threads.small(torch.nn.Linear(2, 2, device="meta"))


def test_generate_computes_a_small_model_with_one_thread():
    out = subprocess.run([sys.executable, "-c", GENERATE], capture_output=True, text=True, check=True).stdout
    assert out.split()[0] == "2" and out.split()[-1] == "1"
