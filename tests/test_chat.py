"""A dialogue that keeps its cache against the same dialogue rendered and computed at once."""

import contextlib
import dataclasses

import pytest
import tiny
import torch

import minivlm
from minivlm.answer import Options
from minivlm.errors import InputError
from minivlm.generate import Row, collect, generate, new_cache
from minivlm.processor import Inputs
from minivlm.processor.prompts import TEMPLATES
from minivlm.sampler import Choice, Sampling

EOS = 2
# As on the hub for LLaVA-1.5: an answer is followed by a blank, not by an end-of-text token.
NO_EOS = """{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] %}\
{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
REWRITES = "{% for message in messages %}{{ messages | length }}{{ message['content'][0]['text'] }}{% endfor %}"


@pytest.fixture
def vlm(tiny_of):
    return tiny_of("next-mistral").vlm


def with_template(vlm: minivlm.Pipeline, template: str) -> minivlm.Pipeline:
    return minivlm.Pipeline(vlm.model, dataclasses.replace(vlm.processor, chat_template=template))


@pytest.fixture
def script(vlm, monkeypatch):
    """A list of ids that are answered next, whatever the logits; the model computes as ever."""
    ids: list[int] = []

    def scripted(logits, samplings, positions, seen, bitmasks, starts):
        return (Choice(ids.pop(0), -1.0, -1.0, ()),)

    decoder = vlm.model.language_model
    monkeypatch.setattr(decoder, "backend", dataclasses.replace(decoder.backend, sampler=lambda allowed: scripted))
    return ids


@contextlib.contextmanager
def forwards(vlm: minivlm.Pipeline, fail_at: int | None = None):
    """The number of positions of each forward of the decoder; the forward of index fail_at is interrupted."""
    sizes: list[int] = []

    def count(module, args, output):
        if len(sizes) == fail_at:
            raise KeyboardInterrupt
        sizes.append(args[0].shape[0])

    hook = vlm.model.language_model.register_forward_hook(count)
    try:
        yield sizes
    finally:
        hook.remove()


def answered(turns: list[tuple], system: str | None = None) -> list[dict]:
    """The messages of (question, number of pictures, answer) turns; an answer None is left out."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, pictures, answer in turns:
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def answer_ids(vlm: minivlm.Pipeline, text: str, template: str) -> list[int]:
    """An answer's ids in its place: all templates but chatml put a blank before it, as tokenising it does."""
    encode = vlm.processor.tokenizer.encode
    if template != "chatml_direct":
        return encode(text, add_bos=False)
    return encode("\n" + text, add_bos=False)[len(encode("\n", add_bos=False)) :]


@pytest.mark.parametrize("template", [*TEMPLATES, "no_eos"])
@pytest.mark.parametrize("ending", ["stop", "length", "dropped"])
def test_ids_are_those_of_the_whole_dialogue_rendered(vlm, script, template, ending):
    """However an answer ended, the template closes it once; and each turn prefills only what is new."""
    vlm = with_template(vlm, TEMPLATES.get(template, NO_EOS))
    chat = vlm.chat(system="Be kind.")
    images = [tiny.picture(20, 30), tiny.picture(9, 9)]
    turns = [("what is it", 1, "the cat."), ("why", 0, "It is red!"), ("and 1 < 2", 1, "a")]
    for i, (question, pictures, answer) in enumerate(turns):
        ids = answer_ids(vlm, answer, template)
        script[:] = [*ids, EOS]
        shown = sum(count for _, count, _ in turns[:i])
        arguments = question, images[shown : shown + pictures]
        held = len(chat.ids)
        with forwards(vlm) as sizes:
            if ending == "dropped":
                stream = chat.stream(*arguments)
                assert "".join(next(stream).text for _ in ids) == answer
                stream.close()
            else:
                reply = chat.say(*arguments, max_new_tokens=len(ids) + (ending == "stop"))
                assert (reply.finish_reason, reply.text) == (ending, answer)
        messages = answered([*turns[:i], (question, pictures, None)], "Be kind.")
        whole = vlm.processor.chat(messages, images[: shown + pictures])
        assert list(chat.ids) == [*whole.ids, *ids]
        pending = 0 if i == 0 or ending == "stop" else 1  # the last id of an answer is not cached; eos is dropped
        assert sizes[0] == len(whole.ids) - held + pending
        assert sizes[1:] == [1] * (len(sizes) - 1)
    texts = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    assert texts == [answer for *_, answer in turns]


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_later_turns_equal_a_fresh_prefill_of_the_whole_dialogue(tiny_of, kind):
    """Ids and log-probabilities of three turns, the later ones with new pictures, against one-shot rows."""
    vlm = tiny_of(kind).vlm
    chat = vlm.chat()
    shown: list[Inputs] = []
    for images in ([], [tiny.picture(20, 30, 1)], [tiny.picture(8, 50, 2), tiny.picture(30, 9, 3)]):
        reply = chat.say("is it red", images, max_new_tokens=8, top_logprobs=5)
        shown += [vlm.processor("<image>", [image]) for image in images]
        whole = Inputs(
            ids=chat.ids[: reply.prompt_tokens],
            tiles=torch.cat([torch.empty(0, 3, tiny.TILE, tiny.TILE), *(picture.tiles for picture in shown)]),
            image_sizes=tuple(picture.image_sizes[0] for picture in shown),
            tile_counts=tuple(picture.tile_counts[0] for picture in shown),
        )
        row = Row(whole, Options(Sampling(top_logprobs=5), 8), vlm.vocabulary, vlm.context)
        (fresh,) = collect([row], generate(vlm.model, [row], new_cache(vlm.model, [row])))
        assert [token.id for token in fresh.tokens] == [token.id for token in reply.tokens]
        for one, two in zip(fresh.tokens, reply.tokens, strict=True):
            assert [a.id for a in one.alternatives] == [a.id for a in two.alternatives]
            expected = pytest.approx([a.logprob for a in two.alternatives], abs=1e-5)
            assert [a.logprob for a in one.alternatives] == expected
    assert len(shown) == 3


def test_first_turn_is_generate(vlm):
    image = tiny.picture(20, 30)
    reply, alone = (
        vlm.chat().say("the cat", [image], max_new_tokens=9),
        vlm.generate("the cat", [image], max_new_tokens=9),
    )
    assert reply.tokens == alone.tokens


def test_a_turn_beyond_the_context_leaves_the_dialogue_as_it_was(vlm):
    chat, other = vlm.chat(), vlm.chat()
    for dialogue in (chat, other):
        dialogue.say("the cat", max_new_tokens=5)
    ids, messages = chat.ids, list(chat.messages)
    for arguments, settings in (
        (("z" * 500,), {}),
        (("hi",), {"max_new_tokens": 390}),
        (("hi", [b"not a picture"]), {}),
        (("hi <image>",), {}),
        (("hi",), {"temperature": -1}),
    ):
        with pytest.raises(InputError):
            chat.say(*arguments, **settings)
        assert (chat.ids, chat.messages) == (ids, messages)
    assert chat.say("why", max_new_tokens=5).tokens == other.say("why", max_new_tokens=5).tokens


def test_an_interrupt_in_the_middle_keeps_the_partial_answer(vlm):
    """Ctrl-C inside the third decode step: its keys may be half written, and are written again."""
    chat, other = vlm.chat(), vlm.chat()
    with forwards(vlm, fail_at=3), pytest.raises(KeyboardInterrupt):
        chat.say("the cat", max_new_tokens=9)
    expected = other.say("the cat", max_new_tokens=3)
    assert chat.ids == other.ids
    assert chat.messages == other.messages
    assert chat.messages[-1]["content"] == expected.text
    assert chat.say("why", max_new_tokens=5).tokens == other.say("why", max_new_tokens=5).tokens


def test_an_interrupt_before_the_first_token_is_no_turn(vlm):
    chat, other = vlm.chat(), vlm.chat()
    other.say("the cat", max_new_tokens=5)
    with forwards(vlm, fail_at=0), pytest.raises(KeyboardInterrupt):
        chat.say("never", max_new_tokens=5)
    assert chat.ids == () and chat.messages == []
    chat.say("the cat", max_new_tokens=5)
    ids = chat.ids
    with forwards(vlm, fail_at=0), pytest.raises(KeyboardInterrupt):
        chat.say("never", [tiny.picture(9, 9)], max_new_tokens=5)
    assert chat.ids == ids
    assert chat.say("why", max_new_tokens=5).tokens == other.say("why", max_new_tokens=5).tokens


def test_the_next_turn_ends_an_open_stream(vlm):
    chat, other = vlm.chat(), vlm.chat()
    stream = chat.stream("the cat", max_new_tokens=9)
    for _ in range(4):
        next(stream)
    unread = chat.stream("is not read")
    other.say("the cat", max_new_tokens=4)
    assert chat.say("why", max_new_tokens=5).tokens == other.say("why", max_new_tokens=5).tokens
    assert list(stream) == list(unread) == []
    assert chat.messages == other.messages


def test_reset_forgets_all_but_the_system_text(vlm):
    chat = vlm.chat(system="Be kind.")
    first = chat.say("the cat", max_new_tokens=5)
    chat.say("why", [tiny.picture(9, 9)], max_new_tokens=5)
    chat.reset()
    assert chat.ids == () and chat.messages == [{"role": "system", "content": "Be kind."}]
    assert chat.say("the cat", max_new_tokens=5).tokens == first.tokens
    assert first.tokens != vlm.chat().say("the cat", max_new_tokens=5).tokens


def test_a_dialogue_to_the_end_of_the_context(tmp_path):
    """The cache grows with the turns; one that does not fit is refused, and a shorter one is answered."""
    vlm = minivlm.load(tiny.make_tiny(tmp_path, text={"max_position_embeddings": 90}), device="cpu", dtype="float32")
    chat = vlm.chat()
    for _ in range(4):
        chat.say("why", max_new_tokens=6)
    free = 90 - len(chat.ids)
    with pytest.raises(InputError, match="context of 90"):
        chat.say("why", max_new_tokens=free)
    reply = chat.say("why")
    assert reply.finish_reason == "stop" or reply.prompt_tokens + len(reply.tokens) == 90


def test_a_template_that_rewrites_earlier_turns_is_refused(vlm):
    chat = with_template(vlm, REWRITES).chat()
    chat.say("hi", max_new_tokens=2)
    with pytest.raises(InputError, match="rewrites earlier turns"):
        chat.say("why")


def test_a_checkpoint_without_a_template_is_refused(vlm):
    pipeline = minivlm.Pipeline(vlm.model, dataclasses.replace(vlm.processor, chat_template=None))
    with pytest.raises(InputError, match="no chat template"):
        pipeline.chat().say("hi")


def test_a_question_that_looks_like_the_stand_in(vlm, script):
    chat = vlm.chat()
    turns = [("\ue000 is", 0, "the \ue000"), ("a \ue000", 0, None)]
    ids = answer_ids(vlm, turns[0][2], "mistral_instruct")
    script[:] = [*ids, EOS, EOS]
    chat.say(turns[0][0])
    chat.say(turns[1][0])
    assert chat.ids == vlm.processor.chat(answered(turns)).ids


def test_penalties_of_a_turn_do_not_count_earlier_turns(vlm):
    """Each turn has the same few ids to choose among; the second is as a prompt that holds the first answer."""
    chat, settings = vlm.chat(), {"max_new_tokens": 8, "logit_bias": {7: 60, 8: 60, 9: 60}, "frequency_penalty": 2.0}
    first, second = chat.say("the cat", **settings), chat.say("is it red", **settings)
    ids = [token.id for token in second.tokens]
    assert {token.id for token in first.tokens} & set(ids)
    prompt = dataclasses.replace(vlm.inputs("a", raw=True), ids=chat.ids[: second.prompt_tokens])
    assert [token.id for token in vlm.generate(prompt, **settings).tokens] == ids
