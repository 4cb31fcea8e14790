"""A row on its way: its text never in half characters, stop strings, and what ends it."""

from hypothesis import given, settings
from hypothesis import strategies as st

import minivlm
from minivlm.answer import Options
from minivlm.row import Row, StopStrings
from minivlm.sampler import Choice, Sampling


def ids_of(reply: minivlm.Reply) -> list[int]:
    return [token.id for token in reply.tokens]


def test_streamed_text_is_the_decoded_text(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    for seed in range(25):  # at this temperature half the ids are single bytes, most of them not UTF-8
        tokens = list(vlm.stream("hi", max_new_tokens=30, temperature=4.0, seed=seed))
        ids = [token.id for token in tokens if token.id not in vlm.vocabulary.eos_ids]
        assert "".join(token.text for token in tokens) == vlm.processor.decode(ids)
        assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)


def scripted(vlm: minivlm.Pipeline, ids: list[int], stop=(), limit: int | None = None) -> list[minivlm.Token]:
    """The tokens of a row whose ids are given instead of chosen."""
    options = Options(Sampling(), len(ids) if limit is None else limit, stop)
    row = Row(vlm.inputs("hi", raw=True), options, vlm.vocabulary, vlm.context)
    tokens = []
    for token_id in ids:
        if row.finish_reason is None:
            tokens.append(row.accept(Choice(token_id, -1.0, -1.0, ())))
    return tokens


def test_never_half_a_character(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    party, bang = vlm.processor.tokenizer.encode("🎉!", add_bos=False)[1:], "!"  # the first id is the blank
    texts = [token.text for token in scripted(vlm, party)]
    assert texts == ["", "", "", "", "🎉" + bang]
    cut = [token.text for token in scripted(vlm, party[:3])]
    assert cut == ["", "", "\ufffd\ufffd\ufffd"]  # the limit came in the middle


def test_end_of_text_ids(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    greedy = vlm.generate("the cat", max_new_tokens=20)
    for at in (0, 3, 7):
        ends = greedy.tokens[at].id
        if ends in ids_of(greedy)[:at]:
            continue
        pipeline = minivlm.Pipeline(vlm.model, vlm.processor, eos_ids=(5, ends))
        reply = pipeline.generate("the cat", max_new_tokens=20)
        assert ids_of(reply) == ids_of(greedy)[: at + 1]
        assert reply.finish_reason == "stop"
        assert reply.text == vlm.processor.decode(ids_of(greedy)[:at])
    assert pipeline.vocabulary.eos_ids == {2, 5, ends}


def test_limit_and_end_of_text_on_the_same_token_is_a_stop(tiny_of):
    tokens = scripted(tiny_of("next-mistral").vlm, [300, 2])
    assert tokens[-1].finish_reason == "stop"


def test_stop_string_ends_the_answer_before_it(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    ids = vlm.processor.tokenizer.encode("the cat is red. END of it", add_bos=False)
    for stop, text in ((["END"], "the cat is red. "), (["x", "cat is"], "the "), (["the"], "")):
        tokens = scripted(vlm, ids, stop)
        assert "".join(token.text for token in tokens) == text
        assert tokens[-1].finish_reason == "stop_string"
    tokens = scripted(vlm, ids, ["END of it."])
    assert "".join(token.text for token in tokens) == "the cat is red. END of it"
    assert tokens[-1].finish_reason == "length"


def test_stop_string_in_a_real_generation(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    whole = vlm.generate("what colour is it", max_new_tokens=40).text
    stop = whole[6:9]
    reply = vlm.generate("what colour is it", max_new_tokens=40, stop=[stop])
    assert reply.finish_reason == "stop_string"
    assert reply.text == whole[: whole.index(stop)]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_hold_back_exactly_what_could_become_one(pieces, stops):
    filter_ = StopStrings(stops)
    text, shown = "", ""
    for i, piece in enumerate(pieces):
        text += piece
        part, stopped = filter_.push(piece, last=i == len(pieces) - 1)
        shown += part
        found = [at for at in map(text.find, stops) if at >= 0]
        assert stopped == bool(found)
        if stopped:
            assert shown == text[: min(found)]
            return
        assert text.startswith(shown)
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        beginnings = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        assert len(held) == (0 if i == len(pieces) - 1 else max(beginnings, default=0))
    assert shown == text
