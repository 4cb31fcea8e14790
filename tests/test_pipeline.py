"""What a user types: loading, the forms of a prompt, batches, and the one-line errors."""

import pytest
import tiny
import torch
import transformers

import minivlm
from minivlm.errors import InputError
from minivlm.pipeline import choose_device


@pytest.fixture
def vlm(tiny_of):
    return tiny_of("next-mistral").vlm


def ids(reply: minivlm.Reply) -> list[int]:
    return [token.id for token in reply.tokens]


def test_all_forms_of_a_prompt_agree(vlm, tmp_path):
    image = tiny.picture(20, 30)
    image.save(tmp_path / "cat.png")
    text = {"type": "text", "text": "what is it"}
    forms = [
        vlm.generate("what is it", [image], max_new_tokens=6),
        vlm.generate("what is it", images=[tmp_path / "cat.png"], max_new_tokens=6),
        vlm.generate([{"role": "user", "content": [{"type": "image"}, text]}], [image], max_new_tokens=6),
        vlm.generate([{"role": "user", "content": [{"type": "image", "image": image}, text]}], max_new_tokens=6),
        vlm.generate(
            [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "cat.png")}, text]}],
            max_new_tokens=6,
        ),
        vlm.generate("[INST] <image>\nwhat is it [/INST]", [image], raw=True, max_new_tokens=6),
        vlm.generate(vlm.processor("[INST] <image>\nwhat is it [/INST]", [image]), max_new_tokens=6),
    ]
    assert all(reply.tokens == forms[0].tokens for reply in forms)
    assert forms[0].prompt_tokens == len(vlm.inputs("what is it", [image]).ids)


def test_stream_gives_the_tokens_of_generate(vlm):
    settings = {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.9, "seed": 42, "top_logprobs": 2}
    assert tuple(vlm.stream("the cat", **settings)) == vlm.generate("the cat", **settings).tokens


def test_stream_refuses_bad_input_when_called(vlm):
    with pytest.raises(InputError):
        vlm.stream("the cat", ["no such file.png"])
    with pytest.raises(InputError):
        vlm.stream("the cat", top_p=2)


def test_batch_gives_what_generate_gives(vlm):
    requests = [
        ("what is it", [tiny.picture(20, 30)]),
        ("hi", []),
        ("two", [tiny.picture(5, 9), tiny.picture(9, 5)]),
    ]
    for reply, (prompt, images) in zip(vlm.generate_batch(requests, max_new_tokens=8), requests, strict=True):
        alone = vlm.generate(prompt, images, max_new_tokens=8)
        assert ids(reply) == ids(alone) and reply.text == alone.text
        assert reply.prompt_tokens == alone.prompt_tokens
        assert reply.prefill_seconds > 0 and reply.decode_seconds > 0


def test_logits_of_every_position_equal_transformers(tiny_of):
    pair = tiny_of("next-mistral")
    text, image = "<image> the cat", tiny.picture(20, 30)
    with torch.no_grad():
        expected = pair.oracle(**pair.processor(text=text, images=image, return_tensors="pt")).logits[0]
        assert torch.equal(pair.vlm.model([pair.vlm.processor(text, [image])]), expected)


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_a_saved_folder_loads_here_and_in_transformers(tiny_of, kind, tmp_path):
    pair = tiny_of(kind)
    pair.vlm.save(tmp_path / "copy")
    request = ("what is it", [tiny.picture(20, 30)])
    again = minivlm.load(tmp_path / "copy", device="cpu", dtype="float32", backend="reference")
    assert again.generate(*request, max_new_tokens=8).tokens == pair.vlm.generate(*request, max_new_tokens=8).tokens
    assert again.vocabulary.eos_ids == pair.vlm.vocabulary.eos_ids
    oracle = tiny.MODELS[kind][0].from_pretrained(tmp_path / "copy", dtype=torch.float32, attn_implementation="eager")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "copy")
    batch = processor(text="<image> the cat", images=request[1], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(oracle(**batch).logits, pair.oracle(**batch).logits)


def test_a_pipeline_made_in_code_is_saved_with_its_end_of_text_ids(vlm, tmp_path):
    minivlm.Pipeline(vlm.model, vlm.processor, eos_ids=[300]).save(tmp_path / "made")
    assert minivlm.load(tmp_path / "made", device="cpu").vocabulary.eos_ids == {2, 300}
    values = transformers.GenerationConfig.from_pretrained(tmp_path / "made")
    assert (values.eos_token_id, values.bos_token_id) == ([2, 300], 1)


def test_end_of_text_ids_come_from_the_folder_and_the_tokenizer(tmp_path):
    folder = tiny.make_tiny(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert minivlm.load(folder, device="cpu").vocabulary.eos_ids == {2, 7, 9}


def test_prompt_format_for_a_folder_without_a_template(tmp_path):
    folder = tiny.make_tiny(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        minivlm.load(folder, device="cpu").generate("hi")
    vlm = minivlm.load(folder, device="cpu", prompt_format="vicuna_v1")
    assert vlm.inputs("hi").ids == vlm.inputs("USER: hi ASSISTANT:", raw=True).ids
    with pytest.raises(InputError, match="prompt format 'alpaca', expected one of"):
        minivlm.load(folder, device="cpu", prompt_format="alpaca")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_one_clear_line(tiny_of):
    with pytest.raises(InputError) as caught:
        minivlm.load(tiny_of("next-mistral").folder, device="cuda")
    assert "finds no CUDA device, expected auto or cpu" in str(caught.value) and "\n" not in str(caught.value)
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", 3.5, "meta"])
def test_unknown_device_is_refused(name):
    with pytest.raises(InputError, match="expected auto, cpu, cuda"):
        choose_device(name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "no/such/folder"}, "no such folder"),
        ({"backend": "fast"}, "backend 'fast' is not known"),
        ({"dtype": "int8"}, "dtype 'int8', expected auto"),
    ],
)
def test_load_refuses_by_name(tiny_of, arguments, message):
    with pytest.raises(InputError, match=message):
        minivlm.load(**{"model": tiny_of("next-mistral").folder, "device": "cpu", **arguments})


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda vlm: vlm.generate_batch(["hi"]),
            r"requests\[0\]: expected a pair \(prompt, images\), found 'hi'",
        ),
        (lambda vlm: vlm.generate_batch([("hi", []), ("hi", [], 1)]), r"requests\[1\]: expected a pair"),
        (lambda vlm: vlm.generate("hi", "cat.png"), "images: expected a list of pictures, found str"),
        (
            lambda vlm: vlm.generate([{"role": "user", "content": "hi"}], raw=True),
            "prompt: expected a string",
        ),
        (
            lambda vlm: vlm.generate(vlm.inputs("hi"), raw=True),
            "prompt: found Inputs beside images or raw=True",
        ),
        (
            lambda vlm: vlm.generate("hi", max_tokens=3),
            "max_tokens: not a setting, expected one of max_new_tokens",
        ),
        (lambda vlm: vlm.generate("<image>", raw=True), "prompt: 1 <image> for 0 pictures"),
        (lambda vlm: vlm.generate(["hi"]), r"messages\[0\]"),
        (
            lambda vlm: vlm.generate(None),
            "prompt: expected a question, a list of messages or Inputs, found NoneType",
        ),
        (
            lambda vlm: vlm.chat().say("hi", tiny.picture(9, 9)),
            "images: expected a list of pictures, found Image",
        ),
        (lambda vlm: vlm.generate("hi", None), "images: expected a list of pictures, found NoneType"),
    ],
)
def test_bad_calls_are_refused_in_one_line(vlm, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(vlm)
    assert "\n" not in str(caught.value)


def test_public_names():
    assert {"load", "Pipeline", "Chat", "Reply", "Token", "InputError"} <= set(minivlm.__all__)
    assert minivlm.__version__ == "0.1.0"
