"""Where kernels are tested: in Triton's interpreter on a CPU, or on a GPU where there is one (`pytest -m cuda`)."""

import pytest

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

if triton.knobs.runtime.interpret:
    import bf16
    import interpreting

    bf16.install()
    interpreting.install()
