"""Where kernels are tested: in Triton's interpreter on a CPU, or on a GPU where there is one (`pytest -m cuda`)."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    import bf16

    bf16.install()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="on a GPU nothing is interpreted")),
        pytest.param(
            "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
        ),
    ]
)
def device(request) -> torch.device:
    """Each test that runs a kernel runs it on each of these."""
    return torch.device(request.param)
