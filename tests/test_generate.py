"""Generation against transformers' generate() and forward(), and against itself in other batches and chunks.

Bugs that others had, guarded here: batches of mixed sizes, padding that matters, decode steps that do not see
every token, rows with different numbers of pictures, prefill chunks that split a picture.
"""

import dataclasses
import itertools
import random

import pytest
import tiny
import torch
from warpers import shifted_by_hand, transformers_warpers

import minivlm
from minivlm.answer import Options
from minivlm.errors import InputError, NumericError
from minivlm.generate import Row, Vocabulary, collect, generate, new_cache, parts
from minivlm.sampler import Sampling

KINDS = list(tiny.MODELS)
GREEDY = Sampling()
# Raw prompts with 0, 1 and 2 pictures (height, width); one picture is smaller than a tile, one very flat.
PROMPTS = [
    ("what colour is it", []),
    ("<image>\nthe cat", [(20, 30)]),
    ("<image> is <image>\n two", [(40, 9), (7, 5)]),
    ("a picture of a red cat, is it <image>", [(3, 90)]),
]


def requests() -> list[tuple[str, list]]:
    return [(text, [tiny.picture(*size, seed=i) for i, size in enumerate(sizes)]) for text, sizes in PROMPTS]


def rows_of(
    vlm: minivlm.Pipeline, prompts: list, sampling: Sampling = GREEDY, limit: int | None = 12, stop=()
) -> list[Row]:
    options = Options(sampling, limit, stop)
    return [Row(vlm.inputs(text, images, raw=True), options, vlm.vocabulary, vlm.context) for text, images in prompts]


def run(vlm: minivlm.Pipeline, rows: list[Row], chunk: int = 8192) -> list[minivlm.Reply]:
    return collect(rows, generate(vlm.model, rows, new_cache(vlm.model, rows), chunk))


def ids_of(reply: minivlm.Reply) -> list[int]:
    return [token.id for token in reply.tokens]


def oracle_ids(pair, prompts: list, limit: int, **settings) -> list[list[int]]:
    """transformers' answers to a left-padded batch; what has no text is suppressed, as we do."""
    texts, images = [text for text, _ in prompts], [image for _, images in prompts for image in images]
    batch = pair.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    never = (~pair.vlm.vocabulary.allowed).nonzero().flatten().tolist()
    output = pair.oracle.generate(
        **batch, max_new_tokens=limit, do_sample=False, suppress_tokens=never, pad_token_id=2, **settings
    )
    answers = output[:, batch.input_ids.shape[1] :].tolist()
    return [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in answers]


def assert_same(ours: minivlm.Reply, other: minivlm.Reply) -> None:
    assert ids_of(ours) == ids_of(other)
    assert ours.text == other.text
    for one, two in zip(ours.tokens, other.tokens, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-5)
        assert one.sampled_logprob == pytest.approx(two.sampled_logprob, abs=1e-5)


# ---- against transformers


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_equal_transformers(tiny_of, kind):
    pair = tiny_of(kind)
    for request in requests():
        (reply,) = run(pair.vlm, rows_of(pair.vlm, [request], limit=40))
        assert [ids_of(reply)] == oracle_ids(pair, [request], 40)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_mixed_pictures_equals_rows_alone_and_transformers(tiny_of, kind):
    """checklist 11, 14"""
    pair = tiny_of(kind)
    batch = run(pair.vlm, rows_of(pair.vlm, requests(), limit=25))
    for together, request in zip(batch, requests(), strict=True):
        (alone,) = run(pair.vlm, rows_of(pair.vlm, [request], limit=25))
        assert_same(together, alone)
    assert [ids_of(reply) for reply in batch] == oracle_ids(pair, requests(), 25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_greedy_ids_of_single_prompts_equal_transformers_in_low_precision(tiny_of, dtype):
    """There the two compute bit for bit alike, near ties included."""
    pair = tiny_of("next-mistral")
    low = dataclasses.replace(
        pair,
        vlm=minivlm.load(pair.folder, device="cpu", dtype=dtype, backend="reference"),
        oracle=type(pair.oracle).from_pretrained(pair.folder, dtype=dtype, attn_implementation="eager"),
    )
    for request in requests():
        (reply,) = run(low.vlm, rows_of(low.vlm, [request], limit=40))
        assert [ids_of(reply)] == oracle_ids(low, [request], 40)


def test_padding_is_irrelevant(tiny_of):
    """checklist 12: transformers pads the short row by more and more; ours has nothing to pad, and neither changes."""
    pair = tiny_of("next-mistral")
    short = PROMPTS[0]
    answers = set()
    for length in (1, 20, 60):
        batch = [short, ("cat " * length, [])]
        ours = [ids_of(reply) for reply in run(pair.vlm, rows_of(pair.vlm, batch))]
        assert ours == oracle_ids(pair, batch, 12)
        answers.add(tuple(ours[0]))
    assert len(answers) == 1


def test_repetition_penalty_equals_transformers(tiny_of):
    pair = tiny_of("next-mistral")
    plain, penalised = (
        run(pair.vlm, rows_of(pair.vlm, requests(), Sampling(repetition_penalty=penalty), 30)) for penalty in (1, 1.6)
    )
    assert [ids_of(reply) for reply in penalised] == oracle_ids(pair, requests(), 30, repetition_penalty=1.6)
    assert [ids_of(reply) for reply in penalised] != [ids_of(reply) for reply in plain]


def replayed(vlm: minivlm.Pipeline, text: str, images: list, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """A prompt's ids, and the logits [n, V] before each id of an answer to it, by one forward pass of all."""
    inputs = vlm.inputs(text, images, raw=True)
    with torch.no_grad():
        logits = vlm.model([dataclasses.replace(inputs, ids=(*inputs.ids, *ids))])[len(inputs.ids) - 1 : -1]
    return list(inputs.ids), logits.masked_fill(~vlm.vocabulary.allowed, -torch.inf)


@pytest.mark.parametrize(
    "asked",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"presence_penalty": -0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"frequency_penalty": 0.7, "logit_bias": {5: 1.5, 9: -100, 40: 2}},
    ],
)
def test_greedy_answers_with_penalties_equal_sums_by_hand(tiny_of, asked):
    """The answer's ids count and the prompt's do not; the repetition penalty's are both."""
    vlm = tiny_of("next-mistral").vlm
    plain = ids_of(vlm.generate(*requests()[1], raw=True, max_new_tokens=25))
    reply = vlm.generate(*requests()[1], raw=True, max_new_tokens=25, **asked)
    prompt, logits = replayed(vlm, *requests()[1], ids_of(reply))
    for n, token in enumerate(reply.tokens):
        seen = [*prompt, *ids_of(reply)[:n]]
        scores = torch.tensor(shifted_by_hand(logits[n].tolist(), seen, len(prompt), Sampling(**asked)))
        assert token.id == int(scores.argmax())
        assert token.sampled_logprob == pytest.approx(scores.log_softmax(-1)[token.id].item(), abs=1e-4)
    assert ids_of(reply) != plain


def test_an_answer_that_repeats_itself_is_ended_by_a_frequency_penalty(tmp_path):
    """One id is made the likeliest by far whatever came before it; each time it comes it costs two more."""
    vlm = minivlm.load(tiny.make_tiny(tmp_path), device="cpu", dtype="float32", backend="sdpa")
    decoder, favourite = vlm.model.language_model, vlm.processor.tokenizer.encode("cat", add_bos=False)[-1]

    def favoured(_, args, logits):
        logits[:, favourite] = logits.amax(-1) + 6
        return logits

    hook = decoder.lm_head.register_forward_hook(favoured)
    settings = {"raw": True, "max_new_tokens": 40}
    assert set(ids_of(vlm.generate("cat cat cat cat", **settings))) == {favourite}
    assert set(ids_of(vlm.generate("cat cat cat cat", **settings, presence_penalty=2.0))) == {
        favourite
    }  # once is not 6
    ids = ids_of(vlm.generate("cat cat cat cat", **settings, frequency_penalty=2.0))
    assert ids[:3] == [favourite] * 3 and 3 <= ids.count(favourite) < 20  # those of the prompt cost nothing
    assert max(len(list(run)) for _, run in itertools.groupby(ids)) <= 4
    hook.remove()


def test_a_bias_forbids_and_forces(tiny_of):
    vlm = tiny_of("llava").vlm
    first, *_ = ids_of(vlm.generate(*requests()[1], raw=True, max_new_tokens=1))
    other = vlm.generate(*requests()[1], raw=True, max_new_tokens=12, logit_bias={first: -100})
    assert first not in ids_of(other)
    forced = vlm.generate(*requests()[1], raw=True, max_new_tokens=4, logit_bias={7: 100})
    assert ids_of(forced) == [7] * 4 and all(token.sampled_logprob > -1e-6 > token.logprob for token in forced.tokens)
    with pytest.raises(InputError, match=f"logit_bias: found id {vlm.vocabulary.size}, expected ids below"):
        vlm.generate("the cat", logit_bias={vlm.vocabulary.size: 1})


def test_typical_ids_are_drawn_from_transformers_typical_ids(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    asked = {"typical_p": 0.3, "temperature": 1.2, "top_k": 30, "seed": 5}
    reply = vlm.generate(*requests()[2], raw=True, max_new_tokens=20, **asked)
    _, logits = replayed(vlm, *requests()[2], ids_of(reply))
    scores = transformers_warpers(Sampling(**asked))(torch.zeros(1, 1, dtype=torch.long), logits)
    expected = scores.log_softmax(-1).gather(1, torch.tensor(ids_of(reply))[:, None])[:, 0]
    assert [token.sampled_logprob for token in reply.tokens] == pytest.approx(expected.tolist(), abs=1e-4)
    assert (scores.isfinite().sum(-1) < 30).any() and len(set(ids_of(reply))) > 3


def test_prompt_longer_than_the_sliding_window(tmp_path):
    folder = tiny.make_tiny(tmp_path, text={"sliding_window": 6})
    vlm = minivlm.load(folder, device="cpu", dtype="float32", backend="reference")
    oracle = tiny.MODELS["next-mistral"][0].from_pretrained(folder, attn_implementation="eager")
    for text in ("the cat is red", "a picture of two blue shapes and a cat, what colour is it"):
        (reply,) = run(vlm, rows_of(vlm, [(text, [])], limit=20))
        ids = torch.tensor([vlm.inputs(text, raw=True).ids])
        assert ids_of(reply) == oracle.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_alternatives_are_transformers_log_softmax(tiny_of, kind):
    pair = tiny_of(kind)
    sampling = Sampling(temperature=0.8, top_k=20, seed=3, top_logprobs=5)
    text, images = requests()[2]
    (reply,) = run(pair.vlm, rows_of(pair.vlm, [(text, images)], sampling))
    inputs = pair.processor(text=text, images=images, return_tensors="pt")
    prompt = inputs.input_ids.shape[1]
    inputs["input_ids"] = torch.cat([inputs.input_ids, torch.tensor([ids_of(reply)])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs.input_ids)
    with torch.no_grad():
        logits = pair.oracle(**inputs).logits[0, prompt - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    warped = (logits.masked_fill(~pair.vlm.vocabulary.allowed, -torch.inf) / 0.8).sort(descending=True)
    for i, token in enumerate(reply.tokens):
        assert token.logprob == pytest.approx(expected[i, token.id].item(), abs=1e-5)
        rank = warped.indices[i].tolist().index(token.id)
        assert token.sampled_logprob == pytest.approx(warped.values[i, :20].log_softmax(-1)[rank].item(), abs=1e-5)
        best = expected[i].masked_fill(~pair.vlm.vocabulary.allowed, -torch.inf).topk(5)
        assert [alternative.id for alternative in token.alternatives] == best.indices.tolist()
        assert [a.logprob for a in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)


# ---- prefill and decode


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_prefill_equals_whole_at_every_split(tiny_of, kind):
    """checklist 17: chunks of every size put a boundary on every position of two packed rows, inside pictures too."""
    vlm = tiny_of(kind).vlm
    prompts = requests()[1:3]
    whole = run(vlm, rows_of(vlm, prompts, limit=3))
    total = sum(reply.prompt_tokens for reply in whole)
    for chunk in range(1, total + 2):
        for chunked, expected in zip(run(vlm, rows_of(vlm, prompts, limit=3), chunk), whole, strict=True):
            assert_same(chunked, expected)


def test_parts_cut_the_packed_rows():
    cut = list(parts([3, 4, 1], [0, 10, 5], 5))
    assert [(part.lengths, part.starts, part.slots) for part in cut] == [
        ((3, 2), (0, 10), (0, 1)),
        ((2, 1), (12, 5), (1, 2)),
    ]
    with pytest.raises(InputError, match="chunk: found 0"):
        next(parts([3], [0], 0))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
def test_every_decode_step_sees_every_token(tiny_of, backend):
    """checklist 13: each step's distribution equals that of a fresh prefill of everything before it."""
    vlm = minivlm.load(tiny_of("next-mistral").folder, device="cpu", dtype="float32", backend=backend)
    (row,) = rows_of(vlm, requests()[1:2], Sampling(top_logprobs=20), limit=10)
    (reply,) = run(vlm, [row])
    prompt = vlm.inputs(*requests()[1], raw=True)
    for i, token in enumerate(reply.tokens):
        ids = (*prompt.ids, *ids_of(reply)[:i])
        longer = minivlm.processor.Inputs(ids, prompt.tiles, prompt.image_sizes, prompt.tile_counts)
        fresh = Row(longer, Options(Sampling(top_logprobs=20), 1), vlm.vocabulary, vlm.context)
        (again,) = run(vlm, [fresh])
        assert [a.id for a in again.tokens[0].alternatives] == [a.id for a in token.alternatives]
        expected = pytest.approx([a.logprob for a in token.alternatives], abs=1e-5)
        assert [a.logprob for a in again.tokens[0].alternatives] == expected


def test_finished_rows_leave_the_packed_batch(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    sizes = []
    hook = vlm.model.language_model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    rows = [rows_of(vlm, [request], limit=limit)[0] for request, limit in zip(requests(), (2, 5, 3, 1), strict=True)]
    try:
        replies = run(vlm, rows)
    finally:
        hook.remove()
    assert [len(reply.tokens) for reply in replies] == [2, 5, 3, 1]
    assert sizes == [sum(reply.prompt_tokens for reply in replies), 3, 2, 1, 1]


def test_cache_grows_with_an_open_ended_answer(tiny_of):
    vlm = tiny_of("next-llama").vlm
    (row,) = rows_of(vlm, [("the cat", [])], limit=None)
    cache = new_cache(vlm.model, [row])
    small = cache.capacity
    row.vocabulary = Vocabulary(row.vocabulary.tokenizer, frozenset(), row.vocabulary.size)  # nothing ends it
    (reply,) = collect([row], generate(vlm.model, [row], cache))
    assert small < vlm.context <= cache.capacity
    assert reply.finish_reason == "length" and len(row.ids) == vlm.context
    bounded = rows_of(vlm, [("the cat", [])], limit=vlm.context - row.prompt_tokens)[0]
    bounded.vocabulary = row.vocabulary
    assert_same(run(vlm, [bounded])[0], reply)


def test_generation_leaves_the_model_trainable(tiny_of):
    vlm = tiny_of("llava").vlm
    run(vlm, rows_of(vlm, requests()[:2]))
    vlm.model([vlm.inputs(*requests()[1], raw=True)]).sum().backward()
    gradient = vlm.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    vlm.model.zero_grad()


def test_generation_builds_no_graph(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    assert all(parameter.requires_grad for parameter in vlm.model.parameters())
    (row,) = rows_of(vlm, requests()[1:2])
    cache = new_cache(vlm.model, [row])
    for _ in generate(vlm.model, [row], cache, chunk=5):
        assert not cache.keys.requires_grad and not cache.values.requires_grad


def test_dropped_iterator_says_what_the_cache_holds(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    (row,) = rows_of(vlm, requests()[1:2])
    tokens = generate(vlm.model, [row], new_cache(vlm.model, [row]))
    first = [next(tokens)[1].id for _ in range(4)]
    tokens.close()
    assert row.ids[row.prompt_tokens :] == first
    assert row.cached == len(row.ids) - 1


def test_weights_that_are_not_numbers_are_reported(tmp_path):
    vlm = minivlm.load(tiny.make_tiny(tmp_path), device="cpu", dtype="float32")
    with torch.no_grad():
        vlm.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(NumericError, match="position"):
        vlm.generate("hi", max_new_tokens=2)


# ---- sampling


def test_a_seed_replays_and_does_not_depend_on_neighbours(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    sampling = Sampling(temperature=1.3, top_p=0.95, seed=11)
    batch = run(vlm, rows_of(vlm, requests(), sampling))
    for reply, request in zip(batch, requests(), strict=True):
        assert_same(reply, run(vlm, rows_of(vlm, [request], sampling))[0])
    unseeded = vlm.generate_batch([(request[0], []) for request in requests()[:1] * 2], raw=True, temperature=3.0)
    assert ids_of(unseeded[0]) != ids_of(unseeded[1])  # rows without a seed get one each
    again = vlm.generate(requests()[0][0], raw=True, temperature=3.0, seed=unseeded[0].seed)
    assert ids_of(again) == ids_of(unseeded[0])


def test_the_sampler_is_told_position_and_ids_of_each_row(tiny_of, monkeypatch):
    vlm = tiny_of("llava").vlm
    rows = rows_of(vlm, requests()[:2], limit=4)
    calls = []

    decoder = vlm.model.language_model
    backend = decoder.backend

    def spied(allowed):
        def spy(logits, samplings, positions, seen, bitmasks, starts):
            calls.append(list(zip(positions, [tuple(ids) for ids in seen], starts, strict=True)))
            return backend.sampler(allowed)(logits, samplings, positions, seen, bitmasks, starts)

        return spy

    monkeypatch.setattr(decoder, "backend", dataclasses.replace(backend, sampler=spied))
    replies = run(vlm, rows)
    for i, row in enumerate(rows):
        told = [call[i] for call in calls[: len(replies[i].tokens)]]
        answer = ids_of(replies[i])
        prompt = row.inputs.ids
        assert told == [(len(prompt) + n, (*prompt, *answer[:n]), len(prompt)) for n in range(len(answer))]


def test_ids_without_text_are_never_generated(tmp_path):
    """Spare rows of the head and the image placeholder are made the likeliest by far."""
    folder = tiny.make_tiny(tmp_path)
    vlm = minivlm.load(folder, device="cpu", dtype="float32", backend="sdpa")
    tokens, image_id = (
        vlm.processor.tokenizer.backend.get_vocab_size(),
        vlm.processor.tokenizer.image_token_id,
    )
    with torch.no_grad():
        vlm.model.language_model.lm_head.weight[tokens:] *= 30
        vlm.model.language_model.lm_head.weight[image_id] *= 30
    for settings_ in ({}, {"temperature": 5.0, "seed": 1, "top_logprobs": 20}):
        reply = vlm.generate("the cat", max_new_tokens=40, **settings_)
        named = ids_of(reply) + [a.id for token in reply.tokens for a in token.alternatives]
        assert max(named) < tokens and image_id not in named
    assert max(-token.logprob for token in reply.tokens) > 20  # the raw distribution still counts them


# ---- limits and bad input


def test_prompt_beyond_the_context_is_an_error(tmp_path):
    """checklist 10"""
    vlm = minivlm.load(tiny.make_tiny(tmp_path, text={"max_position_embeddings": 40}), device="cpu", dtype="float32")
    ids = len(vlm.inputs("a b c d", raw=True).ids)
    reply = vlm.generate("a b c d", raw=True, max_new_tokens=40 - ids)
    assert reply.prompt_tokens + len(reply.tokens) <= 40
    with pytest.raises(InputError, match=f"max_new_tokens: found {41 - ids} after a prompt of {ids} tokens.*of 40"):
        vlm.generate("a b c d", raw=True, max_new_tokens=41 - ids)
    long = "z" * 38
    assert len(vlm.inputs(long, raw=True).ids) == 40
    with pytest.raises(InputError, match=r"prompt: found 40 tokens.*context of 40"):
        vlm.generate(long, raw=True)
    with pytest.raises(InputError, match=r"prompt: found .* context of 40"):
        vlm.generate("<image>", [tiny.picture(30, 30)], raw=True, max_new_tokens=1)
    assert len(vlm.generate("z" * 37, raw=True).tokens) == 1  # one position left, one token


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected an integer of at least 1, or None"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: found 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens: found True"),
        ({"stop": "END"}, "stop: found 'END', expected a list of strings"),
        ({"stop": ["END", ""]}, "stop: found"),
        ({"stop": [3]}, "stop: found"),
        ({"temprature": 1}, "temprature: not a setting, expected one of max_new_tokens, stop, temperature"),
        ({"temperature": -1}, "temperature: found -1"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, message):
    with pytest.raises(InputError) as caught:
        Options.of(bad)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_text_without_tokens_is_refused(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    nothing = minivlm.processor.Inputs((), torch.empty(0, 3, tiny.TILE, tiny.TILE), (), ())
    with pytest.raises(InputError, match="prompt: found no tokens"):
        vlm.generate(nothing)


def test_no_rows_is_no_answers(tiny_of):
    assert tiny_of("next-mistral").vlm.generate_batch([]) == []


def test_random_batches_equal_rows_alone(tiny_of):
    """Drawn settings and pictures, so that rows end at different steps for different reasons."""
    vlm = tiny_of("next-llama").vlm
    rng = random.Random(5)
    for _ in range(6):
        rows: tuple[list, list] = ([], [])
        for i in range(rng.randint(2, 5)):
            images = [tiny.picture(rng.randint(1, 40), rng.randint(1, 40), i) for _ in range(rng.randint(0, 2))]
            inputs = vlm.inputs("<image>" * len(images) + "is it", images, raw=True)
            sampling = Sampling(temperature=rng.choice([0.7, 2.0]), seed=rng.randrange(99))
            options = Options(sampling, rng.randint(1, 15), rng.choice([(), ("a",), ("e", "s")]))
            for side in rows:
                side.append(Row(inputs, options, vlm.vocabulary, vlm.context))
        for together, alone in zip(run(vlm, rows[0]), rows[1], strict=True):
            assert_same(together, run(vlm, [alone])[0])
