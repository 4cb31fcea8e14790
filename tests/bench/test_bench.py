"""Every row is produced at tiny sizes, by the same code as at full size. No times are judged."""

import json
import time

import pytest
import torch

from minivlm import cli
from minivlm.bench import cuda, growth, measure, models, programs, report, rows
from minivlm.bench import run as bench
from minivlm.bench.measure import Contender
from minivlm.bench.models import Pair, Shape
from minivlm.bench.rows import Bench
from minivlm.errors import InputError

CPU = torch.device("cpu")
TINY = Shape("tiny", 32, 48, 2, 4, 2, 8, 1500)
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Two rounds, and a machine whose speed need not be measured."""
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(measure, "bandwidth", lambda device, size: 1e10)
    monkeypatch.setattr(measure, "rate", lambda device, dtype, side: 1e12)


@pytest.fixture
def tiny_bench():
    return Bench(CPU, "cpu", 2, 20)


def test_decoder_rows():
    told = []
    found = bench.run(
        ["decode", "context", "batch", "prefill"], CPU, "auto", threads=(1, 2), shapes=(TINY, TINY), prompt=20,
        told=told.append,
    )  # fmt: skip
    assert tuple(told) == found.rows
    first = [(row.name, row.batch, row.context) for row in found.rows if "bfloat16, " in row.setting]
    expected = [("decode", 1, 20), ("context", 1, 60), ("prefill", 1, 0), ("batch", 2, 20), ("batch", 8, 20)]
    assert first[:5] == first[5:10] == expected  # with one thread, then with two
    assert all(set(row.peers) == {"eager", "sdpa"} and row.seconds > 0 for row in found.rows)
    assert all(row.floor.seconds > 0 and row.share > 0 for row in found.rows)
    assert {row.setting.split(", ")[-1] for row in found.rows} == {"1 thread", "2 threads"}
    assert found.machine["backend"] == "cpu" and found.machine["chip"]


def test_shipped_row_answers_alike(tiny_bench):
    row = rows.shipped(tiny_bench)
    assert set(row.peers) == {"transformers"} and row.tokens == 1 and row.floor.bytes > 1e6


def test_contenders_compute_the_same():
    """In float32 the three choose the same ids, step after step, so what is compared is the same work."""
    with torch.inference_mode():
        pair = Pair.of(TINY, torch.float32, CPU, "auto")
        for contenders in (pair.decode(3, 20), pair.prefill(20)):
            for _ in range(2):
                chosen = {}
                for name, contender in contenders.items():
                    chosen[name] = contender.run().tolist()
                    contender.reset()
                assert chosen["minivlm"] == chosen["eager"] == chosen["sdpa"]


def test_the_compiled_peer_takes_the_same_step(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode, fullgraph: model)
    with torch.inference_mode():
        ((_, contender),) = Pair.of(TINY, torch.float32, CPU, "auto").compiled(2, 20).items()
        first = contender.run()
        contender.reset()
        assert torch.equal(contender.run(), first)


def test_cuda_rows_at_tiny_sizes(tiny_bench, monkeypatch):
    found = [
        cuda.vision(tiny_bench, VISION, 2),
        cuda.first_token(tiny_bench, TINY, VISION),
        *cuda.sampling(tiny_bench, 300, (1, 3)),
        *cuda.attention(tiny_bench, 30, 10),
    ]
    assert [row.name for row in found] == ["vision", "first", "sampling", "sampling", "attention", "attention"]
    assert all(row.seconds > 0 and row.floor.seconds > 0 for row in found)
    assert found[1].setting == "tiny, bfloat16, 55 positions"  # 9 + 6 * 7 of the picture, and 4


def test_growth_rows(tiny_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "ROWS", (1, 3))
    found = list(growth.growth(tiny_bench, TINY, VISION, scale=0.02))
    by_unit = {}
    for row in found:
        by_unit.setdefault(row.setting.split()[-1], []).append(row)
    sizes = {unit: [row.size for row in group] for unit, group in by_unit.items()}
    expected = {
        "keys": [10, 20, 40, 80, 160],
        "rows": [1, 3],
        "positions": [5, 10, 20, 40, 80],
        "tiles": [1, 2, 3, 4, 5],
    }
    assert sizes == expected
    assert all(("power" in row.note) == (i > 0) for group in by_unit.values() for i, row in enumerate(group))
    assert all(set(row.peers) == {"sdpa"} for unit in ("keys", "rows", "positions") for row in by_unit[unit])
    report.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_peak_bytes_sees_what_a_run_holds():
    held = measure.peak_bytes(CPU, lambda: (torch.ones(50_000_000), time.sleep(0.3)))
    assert 0.9 < held / 200e6 < 1.2


def test_memory_row():
    found = programs.peak_memory(TINY)
    weights = sum(p.nbytes for p in Pair.of(TINY, torch.bfloat16, CPU, "reference").ours.parameters())
    assert weights < found.needed - TINY.cache_bytes(programs.POSITIONS + programs.STEPS, 2) < 1.5 * weights
    assert found.peak > 0 and found.peers["transformers"] > 0


def test_shell_row():
    """The three commands as they are run, whose answers must agree."""
    row = programs.shell_to_answer(1)
    assert set(row.peers) == {"transformers"} and min(row.seconds, *row.peers.values(), row.floor.seconds) > 0


def test_shell_row_takes_medians_without_the_first_turn(monkeypatch):
    seconds = {"generate": [90, 2, 9, 3], "import sys": [90, 7, 8, 20], "import torch": [90, 1, 1, 5]}
    took, started, now = {kind: iter(each) for kind, each in seconds.items()}, [], [0.0]

    def run(command):
        started.append(next(kind for kind in took if any(word.strip().startswith(kind) for word in command)))
        now.append(now[-1] + next(took[started[-1]]))
        return "red\n"

    monkeypatch.setattr(programs, "_run", run)
    monkeypatch.setattr(programs.time, "perf_counter", lambda: now[-1])
    row = programs.shell_to_answer(3)
    assert started == ["generate", "import sys", "import torch"] * 4
    assert (row.seconds, row.peers, row.floor.seconds) == (3, {"transformers": 8}, 1)


def test_answers_that_differ_are_not_compared(monkeypatch):
    monkeypatch.setattr(programs, "_run", lambda command: "red" if "generate" in command else "blue")
    with pytest.raises(InputError, match="minivlm answered 'red', transformers 'blue'"):
        programs.shell_to_answer(1)


def test_rounds_alternate_and_resets_are_not_timed(monkeypatch):
    clock, order = iter(range(1000)), []
    monkeypatch.setattr(measure, "perf_counter", lambda: next(clock))
    contenders = {
        "a": Contender(lambda: order.append("a"), lambda: order.append("back")),
        "b": Contender(lambda: [next(clock), order.append("b")]),
    }
    assert measure.interleaved(contenders, 3, CPU, warm=1) == {"a": 1, "b": 2}
    assert order == ["a", "back", "b"] * 4


def test_bandwidth_and_rate_count_bytes_and_operations(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure, "interleaved", lambda contenders, *_: {name: 0.5 for name in contenders})
    assert measure.bandwidth(CPU, 40960) == 81920
    assert measure.rate(CPU, torch.float32, 10) == 2 * 10**3 / 0.5


def test_the_command_prints_a_table_or_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "SHAPES", {"300M": TINY, "1B": TINY})
    options = ["--quick", "--device", "cpu", "--threads", "1"]
    assert cli.main(["bench", "decode", "context", *options, "--json", "--plot", str(tmp_path / "p.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["rows"]] == ["decode", "context"] * 2
    assert (tmp_path / "p.png").is_file()
    assert cli.main(["bench", "decode", *options]) == 0
    out, err = capsys.readouterr()
    assert "| decode" in out and "torch" in out and "decode: tiny, bfloat16, 1000 keys, 1 row, 1 thread" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["decoed"], "no row 'decoed' on cpu, expected some of decode, int8, int4, context"),
        (["vision"], "no row 'vision' on cpu"),
        (["--threads", "0"], "--threads: found 0, expected at least 1"),
        (["--backend", "fast"], "backend 'fast' is not known"),
    ],
)
def test_bad_arguments_end_with_one_line(capsys, arguments, message):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_random_weights_are_spread():
    weight = models.random_weight(torch.Size((300, 100)), torch.float32, CPU)
    assert (
        abs(float(weight.std()) * 10 - 1) < 0.05 and models.random_weight(torch.Size((7,)), torch.float32, CPU)[3] == 1
    )
