"""The decoding steps of the backend `cpu` against the decoder that it is made of."""

from collections.abc import Sequence

import pytest
import tiny
import torch
from test_cpu import CASES, DTYPES, form  # noqa: F401  a fixture: every form of the products
from torch.profiler import ProfilerActivity, profile

import minivlm
from minivlm.decoder.mistral import MistralDecoder
from minivlm.kernels.cpu import single_row
from minivlm.kernels.cpu.compact import Compact
from minivlm.kernels.cpu.few_bits import FewBitsLinear
from minivlm.kernels.cpu.single_row import RowAttention, RowLinear
from minivlm.ops import cpu_attention
from minivlm.ops.backend import CPU
from minivlm.ops.cpu_decoding import RECORDED, Step, decoding
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows
from minivlm.sampler import Sampling

LENGTH = 12
ALWAYS = single_row.missing_linear  # as it is before a test's form has it say that there are no kernels


def decoder_of(folder, dtype) -> MistralDecoder:
    return minivlm.load(folder, device="cpu", dtype=dtype, backend="cpu").model.language_model


def steps(decoder: MistralDecoder, ids: list[int], slot: int, capacity: int, start: int = 3) -> torch.Tensor:
    """Hidden states of ids from `start` on, one step after the other in a cache that may have to grow."""
    cache = decoder.new_cache(3, capacity)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    step, found = decoding(decoder, cache), []
    decoder(decoder.embed_tokens(torch.tensor(ids[:start])), Rows.causal([start], slots=[slot]), cache)
    for position in range(start, len(ids)):
        cache.grow(position + 1)
        found.append(step([ids[position]], Rows.causal([1], [position], [slot])))
    return torch.cat(found)


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_one_pass(name, tmp_path):
    """In float32; the cache grows on the way, and the row is not the cache's first."""
    kind, text, vision, config = CASES[name]
    decoder = decoder_of(tiny.make_tiny(tmp_path, kind, text=text, vision=vision, config=config), "float32")
    ids = torch.randint(400, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        whole = decoder(decoder.embed_tokens(torch.tensor(ids)), Rows.causal([LENGTH]), None)[3:]
        for slot, capacity in ((0, LENGTH), (2, 5)):
            torch.testing.assert_close(steps(decoder, ids, slot, capacity), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_error_in_16_bits_is_that_of_the_decoder(kind, dtype, tiny_of):
    """Against float32, root mean square: at most 1.2 times that of the same steps through the blocks. Where weights are
    packed the step rounds scores before the softmax, as `reference` does; the blocks' fused operator does not.
    """
    ids = torch.randint(400, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    exact, decoder = (decoder_of(tiny_of(kind).folder, name) for name in (torch.float32, dtype))
    with torch.inference_mode():
        expected = exact(exact.embed_tokens(torch.tensor(ids)), Rows.causal([40]), None)[3:]
        cache, through_blocks = decoder.new_cache(1, 40), []
        for position, token in enumerate(ids):
            embedding = decoder.embed_tokens(torch.tensor([token]))
            through_blocks.append(decoder(embedding, Rows.causal([1], [position]), cache))
        found, plain = steps(decoder, ids, 1, 40), torch.cat(through_blocks)[3:]
    errors = [float((hidden.float() - expected).square().mean().sqrt()) for hidden in (found, plain)]
    assert found.dtype == dtype and 0 < errors[0] <= 1.2 * errors[1], errors


def test_rows_come_and_go(tiny_of):
    """One row, two, the other one: what each stored is what the next step reads."""
    decoder = decoder_of(tiny_of("next-mistral").folder, "float32")
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    order = [(0,), (1,), (0, 1), (1,), (0, 1), (0,)]
    with torch.inference_mode():
        whole = [decoder(decoder.embed_tokens(torch.tensor(row)), Rows.causal([4]), None) for row in ids]
        cache, at = decoder.new_cache(2, 4), [0, 0]
        step = decoding(decoder, cache)
        for rows in order:
            hidden = step(
                [ids[row][at[row]] for row in rows], Rows.causal([1] * len(rows), [at[r] for r in rows], rows)
            )
            for row, found in zip(rows, hidden, strict=True):
                torch.testing.assert_close(found, whole[row][at[row]], rtol=1e-5, atol=1e-5)
                at[row] += 1
    assert at == [4, 4]


# ---- several rows

LENGTHS, SLOTS = (3, 30, 9, 17, 9, 25), (5, 0, 7, 2, 3, 6)  # of the slots, 1 and 4 are nobody's


def prefilled(decoder: MistralDecoder, garbage: float = 0) -> tuple[KVCache, list[list[int]]]:
    """A cache that holds rows of LENGTHS in SLOTS without their last ids, and something behind them; the rows' ids."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(400, (length,), generator=draw).tolist() for length in LENGTHS]
    cache = decoder.new_cache(8, 31)
    cache.keys.fill_(garbage), cache.values.fill_(garbage)
    packed = torch.tensor([token for row in ids for token in row[:-1]])
    decoder(decoder.embed_tokens(packed), Rows.causal([n - 1 for n in LENGTHS], slots=SLOTS), cache)
    return cache, ids


def last_ids(decoder: MistralDecoder, cache: KVCache, ids: list[list[int]], rows: Sequence[int]) -> torch.Tensor:
    """One step of some of the rows."""
    where = Rows.causal([1] * len(rows), [LENGTHS[row] - 1 for row in rows], [SLOTS[row] for row in rows])
    return decoding(decoder, cache)([ids[row][-1] for row in rows], where)


@pytest.mark.parametrize("call", (-1, 2**30), ids=("one by one", "together"))
@pytest.mark.parametrize("name", CASES)
def test_several_rows_equal_one_pass_of_each(name, call, tmp_path, monkeypatch):
    """In float32: rows of other lengths, slots in any order and with gaps, both forms of attention."""
    monkeypatch.setattr(cpu_attention, "CALL", call)
    kind, text, vision, config = CASES[name]
    decoder = decoder_of(tiny.make_tiny(tmp_path, kind, text=text, vision=vision, config=config), "float32")
    with torch.inference_mode():
        cache, ids = prefilled(decoder, garbage=7.0)
        whole = [decoder(decoder.embed_tokens(torch.tensor(row)), Rows.causal([len(row)]), None)[-1] for row in ids]
        for rows in (range(6), (4, 1), (5, 0, 3)):
            found = last_ids(decoder, cache, ids, rows)
            torch.testing.assert_close(found, torch.stack([whole[row] for row in rows]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_rows_depend_on_their_neighbours_by_rounding_alone(dtype, tiny_of):
    """Against float32, root mean square: a row beside others is at most 1.2 times as wrong as the row by itself."""
    exact, decoder = (decoder_of(tiny_of("next-mistral").folder, name) for name in (torch.float32, dtype))
    with torch.inference_mode():
        (true, ids), (cache, _) = prefilled(exact), prefilled(decoder)
        expected = torch.cat([last_ids(exact, true, ids, [row]) for row in range(6)])
        alone = torch.cat([last_ids(decoder, cache, ids, [row]) for row in range(6)])
        errors = [(last_ids(decoder, cache, ids, range(6)) - expected).square().mean().sqrt()]
        errors.append((alone - expected).square().mean().sqrt())
    assert errors[0] <= 1.2 * errors[1], errors


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="without AMX kernels take 16 rows")
def test_more_rows_than_a_recording_holds(tiny_of, form, monkeypatch):  # noqa: F811
    """They go by kernels, too, of other lengths and in slots in disorder."""
    if form != "compact":
        return
    decoder = decoder_of(tiny_of("next-mistral").folder, "float32")
    calls, at = [], RowAttention.at

    def counted(self: RowAttention, layer: int, qkv: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        calls.append(layer)
        return at(self, layer, qkv, places)

    monkeypatch.setattr(RowAttention, "at", counted)
    for count in (RECORDED + 1, 2 * RECORDED + 1):
        lengths, slots = [2 + row % 7 for row in range(count)], [(5 * row) % count for row in range(count)]
        ids = [[(11 * row + 3 * i) % 400 for i in range(n)] for row, n in enumerate(lengths)]
        packed, cache = torch.tensor([token for row in ids for token in row[:-1]]), decoder.new_cache(count, 9)
        with torch.inference_mode():
            whole = [decoder(decoder.embed_tokens(torch.tensor(row)), Rows.causal([len(row)]), None)[-1] for row in ids]
            decoder(decoder.embed_tokens(packed), Rows.causal([n - 1 for n in lengths], slots=slots), cache)
            step, last = decoding(decoder, cache), Rows.causal([1] * count, [n - 1 for n in lengths], slots)
            calls.clear()
            found = step([row[-1] for row in ids], last)
        assert calls == list(range(len(decoder.layers)))
        torch.testing.assert_close(found, torch.stack(whole), rtol=1e-5, atol=1e-5)


def test_what_is_masked_may_be_no_number(tiny_of):
    """A broken row left it behind: the others are computed one by one."""
    decoder = decoder_of(tiny_of("next-mistral").folder, "float32")
    with torch.inference_mode():
        (clean, ids), (spoilt, _) = prefilled(decoder), prefilled(decoder, garbage=torch.nan)
        expected, found = (last_ids(decoder, cache, ids, range(6)) for cache in (clean, spoilt))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_what_computes_a_single_row(tiny_of, form):  # noqa: F811
    decoder = decoder_of(tiny_of("next-mistral").folder, torch.bfloat16)
    step = Step(decoder, decoder.new_cache(1, 4))
    group = decoder.layers[0].self_attn.q_proj.group
    kind = type(group.kernel(torch.bfloat16, 1))
    assert kind is {"by kernels": RowLinear, "compact": FewBitsLinear}.get(form, type(None))
    assert (step.by_kernels is not None) is (form in ("by kernels", "compact"))


def test_a_weight_that_is_not_compact_among_others(tiny_of, form, monkeypatch):  # noqa: F811
    """Its kernel takes one row, so steps of one row are recorded, and those of several are not."""
    if form != "compact":
        return
    monkeypatch.setattr(single_row, "missing_linear", ALWAYS)
    compact_of = Compact.of
    monkeypatch.setattr(Compact, "of", lambda weight: None if weight.shape[1] > weight.shape[0] else compact_of(weight))
    decoder = decoder_of(tiny_of("next-mistral").folder, "float32")
    kinds = {type(layer.mlp.down_proj.group.kernel(torch.float32, 1)) for layer in decoder.layers}
    assert kinds == {RowLinear} and Step(decoder, decoder.new_cache(1, 4)).by_kernels.most_rows == 1
    ids = list(range(5, 5 + LENGTH))
    with torch.inference_mode():
        whole = decoder(decoder.embed_tokens(torch.tensor(ids)), Rows.causal([LENGTH]), None)[3:]
        torch.testing.assert_close(steps(decoder, ids, 1, LENGTH), whole, rtol=1e-5, atol=1e-5)
        (cache, ids), rows = prefilled(decoder), range(3)
        alone = torch.cat([last_ids(decoder, cache, ids, [row]) for row in rows])
        torch.testing.assert_close(last_ids(decoder, cache, ids, rows), alone, rtol=1e-5, atol=1e-5)


def test_steps_in_any_mode(tiny_of, form):  # noqa: F811
    """One step serves inference mode and none, in either order."""
    decoder = decoder_of(tiny_of("next-mistral").folder, "float32")
    for modes in ((True, False), (False, True)):
        step = decoding(decoder, decoder.new_cache(2, 4))
        found = []
        for position, inference in enumerate(modes):
            with torch.inference_mode(inference), torch.no_grad():
                found.append(step([5, 6], Rows.causal([1, 1], [position] * 2, [0, 1])))
        assert all(hidden.isfinite().all() for hidden in found)


def test_int8_steps_equal_one_pass(tiny_of, form):  # noqa: F811
    """In float32, but for numbers between two steps of 127, which may fall to either."""
    vlm = minivlm.load(tiny_of("next-mistral").folder, device="cpu", dtype="float32", backend="cpu", weights="int8")
    decoder, ids = vlm.model.language_model, list(range(5, 5 + LENGTH))
    with torch.inference_mode():
        whole = decoder(decoder.embed_tokens(torch.tensor(ids)), Rows.causal([LENGTH]), None)[3:]
        found = steps(decoder, ids, 1, LENGTH)
        by_kernels = Step(decoder, decoder.new_cache(1, 4)).by_kernels is not None
    assert by_kernels is (form == "by kernels")
    assert (found - whole).norm() <= 0.005 * whole.norm()


def test_a_position_beyond_the_cache_is_refused(tiny_of):
    decoder = decoder_of(tiny_of("llava").folder, "float32")
    step = decoding(decoder, decoder.new_cache(1, 4))
    with pytest.raises(ValueError, match="position 4 does not fit in a cache of 4 positions"):
        step([5], Rows.causal([1], [4]))


def test_a_model_that_was_not_prepared_takes_the_blocks(tiny_of):
    config = tiny_of("llava").vlm.model.language_model.config
    decoder = MistralDecoder(config, CPU).requires_grad_(False)
    hidden = decoding(decoder, decoder.new_cache(1, 4))([5], Rows.causal([1], [0]))
    assert torch.equal(hidden, decoder(decoder.embed_tokens(torch.tensor([5])), Rows.causal([1]), None))


def test_a_step_calls_few_operators(tiny_of, form):  # noqa: F811
    """Calls of a greedy token from Python's side: a layer's, the choice's. More would make small models slow again."""
    if form == "packed":
        return
    decoder = decoder_of(tiny_of("next-mistral").folder, torch.bfloat16)
    cache = decoder.new_cache(1, 40)
    cache.keys.zero_(), cache.values.zero_()
    eight = decoding(decoder, decoder.new_cache(8, 40))
    step, choose = decoding(decoder, cache), CPU.sampler(torch.ones(decoder.config.vocab_size, dtype=torch.bool))

    def calls(run) -> int:
        run()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            run()
        return sum(event.cpu_parent is None for event in trace.events())

    with torch.inference_mode():
        hidden = calls(lambda: step([5], Rows.causal([1], [30])))
        of_eight = calls(lambda: eight([5] * 8, Rows.causal([1] * 8, [30] * 8)))
        logits = decoder.logits(step([5], Rows.causal([1], [30])))
        chosen = calls(lambda: choose(logits, [Sampling()], [31], [[]]))
    assert hidden <= 20 + 44 * decoder.config.num_hidden_layers and chosen <= 14, (hidden, chosen)
    assert of_eight <= 50 + 45 * decoder.config.num_hidden_layers, of_eight
