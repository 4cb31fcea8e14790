"""The arithmetic of floors, and how rows are shown."""

import json

import pytest

from minivlm.bench.models import SHAPES, Shape
from minivlm.bench.report import Floor, Memory, Report, Row, milli, plot
from minivlm.decoder.mistral import MistralConfig, MistralDecoder
from minivlm.errors import InputError
from minivlm.ops.backend import REFERENCE

SMALL = Shape("small", 8, 12, 3, 4, 2, 6, 20)


def test_a_floor_is_the_longer_of_reading_and_computing():
    assert Floor(bytes=0.5e9, bandwidth=25e9).seconds == 0.02
    assert Floor(bytes=0.5e9, operations=1e12, bandwidth=25e9, rate=2e12).seconds == 0.5
    assert Floor(measured=1.5).seconds == 1.5


def test_share_and_ratios():
    row = Row("decode", "x", 0.04, Floor(bytes=0.5e9, bandwidth=25e9), {"sdpa": 0.1}, tokens=2)
    assert row.share == 0.5 and row.ratios == {"sdpa": 2.5}
    told = row.to_json()
    assert (told["tokens_per_second"], told["share_of_floor"], told["floor"]["seconds"]) == (50, 0.5, 0.02)


def test_matrices_are_those_of_the_model():
    """Every parameter with two axes but the embeddings; a step reads each once, a prompt multiplies by each."""
    decoder = MistralDecoder(MistralConfig.from_hf(SMALL.config_values(), "test"), REFERENCE)
    matrices = {name: p.numel() for name, p in decoder.named_parameters() if p.dim() == 2 and "embed" not in name}
    assert SMALL.matrices == sum(matrices.values())
    cache = decoder.new_cache(5, 7)
    assert 5 * SMALL.cache_bytes(7, 4) == cache.nbytes
    assert SMALL.step_bytes(7, 5, 4) == 4 * SMALL.matrices + cache.nbytes


def test_operations_of_a_prompt_in_loops():
    n, total = 5, 0
    head = SMALL.vocabulary * SMALL.width
    for _ in range(n):
        total += 2 * (SMALL.matrices - head)
    pairs = sum(2 * (i + 0.5) for i in range(n))  # a causal half of the square, its diagonal halved
    total += 2 * head + int(pairs) * 2 * SMALL.layers * SMALL.heads * SMALL.channels
    assert SMALL.prefill_operations(n) == total


def test_published_sizes():
    """kernels' bytes a token in bfloat16: 0.50, 1.88 and 14.2 GB."""
    found = [round(2 * SHAPES[name].matrices / 1e9, 2) for name in ("300M", "1B", "7B")]
    assert found == [0.5, 1.88, 14.22]


def rows() -> tuple:
    floor = Floor(bytes=1e8, bandwidth=1e10)
    names = [("a, 10 keys, 1 row", 1, 10), ("a, 30 keys, 1 row", 1, 30), ("a, 10 keys, 4 rows", 4, 10)]
    timed = [Row("decode", name, 0.02, floor, {"sdpa": 0.05}, b, b, context) for name, b, context in names]
    return (*timed, Row("shell", "whole", 2.0), Memory("memory", "m", 10**9, 11 * 10**8, {"transformers": 2 * 10**9}))


def test_lines_and_json_hold_every_row():
    report = Report({"chip": "abacus"}, rows())
    text = report.lines()
    assert "abacus" in text[0] and len(text) == 4 + len(report.rows)
    assert "sdpa 50 ms (2.50)" in text[4] and "50%" in text[4] and "1.10 x" in text[-1]
    assert len({len(line) for line in text[2:4]}) == 1
    told = json.loads(json.dumps(report.to_json()))
    assert [row["name"] for row in told["rows"]] == ["decode", "decode", "decode", "shell", "memory"]


def test_milliseconds():
    assert [milli(seconds) for seconds in (2.345, 0.02134, 0.0000123)] == ["2345 ms", "21.3 ms", "0.0123 ms"]


def test_a_plot_needs_speeds(tmp_path):
    plot(rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--plot: no two of the rows"):
        plot(rows()[3:], tmp_path / "none.png")
