"""The whole processor against transformers' LlavaNextProcessor and LlavaProcessor; folders of every kind."""

import json
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from mistral_tokenizer import IMAGE_TOKEN_ID, mistral_tokenizer, tokenizer_json
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import minivlm.processor
from minivlm.errors import InputError
from minivlm.processor import ImageConfig, Processor, Tokenizer, VisionGeometry
from minivlm.processor.images import load_image
from minivlm.processor.prompts import TEMPLATES, question_to_messages

PINS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL_PINS = ((28, 56), (56, 28), (56, 56))
NEXT = VisionGeometry(336, 14, PINS)
SMALL = VisionGeometry(28, 14, SMALL_PINS)
LLAVA = VisionGeometry(336, 14, None)
FULL = VisionGeometry(336, 14, None, "full")
QUESTION = "What is shown in this image?"
PROMPT = f"[INST] <image>\n{QUESTION} [/INST]"


def picture(height, width, seed=0):
    rng = np.random.default_rng([seed, height, width])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def hf_tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=mistral_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


@cache
def hf_processor(geometry=NEXT, image_processor=None):
    sizes = {"size": {"shortest_edge": geometry.image_size}, "crop_size": geometry.image_size}
    counts = {"patch_size": 14, "vision_feature_select_strategy": geometry.vision_feature_select_strategy}
    counts |= {"num_additional_image_tokens": 1, "chat_template": TEMPLATES["mistral_instruct"]}
    if geometry.image_grid_pinpoints is None:
        image_processor = image_processor or CLIPImageProcessorPil(**sizes)
        return LlavaProcessor(image_processor, hf_tokenizer(), **counts)
    pins = [list(pin) for pin in geometry.image_grid_pinpoints]
    image_processor = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pins)
    return LlavaNextProcessor(image_processor, hf_tokenizer(), **counts)


@cache
def make(geometry=SMALL):
    tokenizer = Tokenizer(mistral_tokenizer(), pad_token="<pad>")
    config = ImageConfig(geometry.image_size, geometry.image_grid_pinpoints, geometry.image_size)
    return Processor(tokenizer, config, geometry, TEMPLATES["mistral_instruct"])


def assert_equal(ours, theirs, geometry):
    assert list(ours.ids) == theirs.input_ids[0].tolist()
    if geometry.image_grid_pinpoints is None:
        assert torch.equal(ours.tiles, theirs.pixel_values)
        return
    parts = ours.tiles.split(list(ours.tile_counts))
    for part, padded in zip(parts, theirs.pixel_values, strict=True):
        assert torch.equal(part, padded[: len(part)]) and not padded[len(part) :].any()
    assert [list(size) for size in ours.image_sizes] == theirs.image_sizes.tolist()


@pytest.fixture(scope="module", params=[NEXT, LLAVA, FULL], ids=["next", "llava", "llava full"])
def both(request, tmp_path_factory):
    """A geometry, our processor and theirs, ours read from what theirs saved."""
    theirs, folder = hf_processor(request.param), tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return request.param, Processor.from_folder(folder, request.param, IMAGE_TOKEN_ID), theirs


@pytest.mark.parametrize("size", [(336, 336), (480, 640), (37, 900), (88, 55), (1, 1), (899, 1024)])
def test_inputs_equal_transformers(size, both):
    """checklist 7: 2340 tokens for 480x640, not 2339."""
    (geometry, ours, theirs), image = both, picture(*size)
    expected = theirs(images=[image], text=PROMPT, return_tensors="pt")
    assert_equal(ours(PROMPT, [image]), expected, geometry)
    assert_equal(ours.chat(question_to_messages(QUESTION, 1), [image]), expected, geometry)
    assert ours(PROMPT, [image]).ids.count(IMAGE_TOKEN_ID) == geometry.image_token_count(size)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_several_pictures_in_a_prompt(count):
    """checklist 14: pictures of different sizes are consumed in reading order; a row may have none."""
    images = [picture(20 + 40 * i, 100 - 30 * i) for i in range(count)]
    text = "<image>".join(["a", " b ", "\nc", ""][: count + 1])
    theirs = hf_processor(SMALL)(images=images or None, text=text, return_tensors="pt")
    ours = make()(text, images)
    if count:
        assert_equal(ours, theirs, SMALL)
    else:
        assert list(ours.ids) == theirs.input_ids[0].tolist() and ours.tiles.shape == (0, 3, 28, 28)
    assert sum(ours.tile_counts) == len(ours.tiles) and len(ours.tile_counts) == len(ours.image_sizes) == count


@pytest.mark.parametrize(
    "text",
    [
        "<image><image>",
        "hi</s>there <image> <image>",
        " <image>  <image> ",
        "<image>\n\n<image>é🎉",
        "<pad><image>a<image>",
    ],
)
def test_ids_around_placeholders_equal_transformers(text):
    """checklist 20: pads that a text spells are not taken for placeholders."""
    images = [picture(30, 40), picture(50, 20)]
    theirs = hf_processor(SMALL)(images=images, text=text, return_tensors="pt")
    assert_equal(make()(text, images), theirs, SMALL)


def test_an_expanded_prompt_is_refused_unless_it_is_announced():
    """checklist 19"""
    processor, images = make(), [picture(30, 40), picture(50, 20)]
    counts = [SMALL.image_token_count((30, 40)), SMALL.image_token_count((50, 20))]
    expanded = "a" + "<image>" * counts[0] + "b" + "<image>" * counts[1]
    with pytest.raises(InputError, match=rf"{sum(counts)} <image> for 2 pictures.*pass expanded=True"):
        processor(expanded, images)
    short = processor("a<image>b<image>", images)
    assert processor(expanded, images, expanded=True).ids == short.ids
    adjacent = "<image>" * sum(counts)
    assert processor(adjacent, images, expanded=True).ids == processor("<image><image>", images).ids
    for bad in ("a<image>b<image>", expanded + "<image>", expanded[:-7], adjacent + "<image>", "ab"):
        with pytest.raises(InputError, match="placeholders"):
            processor(bad, images, expanded=True)
    swapped = "a" + "<image>" * counts[1] + "b" + "<image>" * counts[0]
    with pytest.raises(InputError, match="does not fit"):
        processor(swapped, images, expanded=True)


def test_one_picture_is_open_at_a_time(monkeypatch):
    """Several large ones together would take gigabytes."""
    opened, still = [], []

    def watched(source):
        still.append(sum(reference() is not None for reference in opened))
        picture = load_image(source)
        opened.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(minivlm.processor, "load_image", watched)
    inputs = make()("<image><image><image>", [np.zeros((8, 8, 3), np.uint8)] * 3)
    assert len(inputs.image_sizes) == 3 and still == [0, 0, 0]


@pytest.mark.parametrize("text, count", [("<image>", 0), ("hello", 1), ("<image><image>", 1), ("<image>", 3)])
def test_unequal_numbers_of_placeholders_and_pictures_are_refused(text, count):
    found = text.count("<image>")
    with pytest.raises(InputError, match=f"prompt: {found} <image> for {count} pictures"):
        make()(text, [picture(9, 9)] * count)


def test_bad_arguments():
    with pytest.raises(InputError, match="prompt: expected a string, found list"):
        make()(["a"])
    with pytest.raises(InputError, match="images: expected a list of pictures, found Image"):
        make()("<image>", picture(9, 9))
    with pytest.raises(InputError, match="images: expected a list of pictures, found str"):
        make()("<image>", "a.png")
    with pytest.raises(InputError, match="no chat template"):
        replace(make(), chat_template=None).chat(question_to_messages("Hi"))


def test_pictures_may_be_named_in_the_messages(tmp_path):
    path = tmp_path / "a.png"
    picture(30, 40).save(path)
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": "Hi"}]
    messages, processor = [{"role": "user", "content": parts}], make()
    given = processor.chat(question_to_messages("Hi", 1), [path])
    assert processor.chat(messages).ids == given.ids and torch.equal(processor.chat(messages).tiles, given.tiles)
    with pytest.raises(InputError, match="1 given and 1 in the messages"):
        processor.chat(messages, [path])


def test_an_image_that_the_words_of_a_user_spell_counts_as_one():
    """As in Hugging Face. The counts then differ, and nothing is guessed."""
    with pytest.raises(InputError, match="2 <image> for 1 pictures"):
        make().chat(question_to_messages("What does <image> mean?", 1), [picture(9, 9)])


# As published for LLaVA-1.5: a blank and no end-of-text token after an answer.
BLANK_AFTER_ANSWERS = TEMPLATES["vicuna_v1"].replace("eos_token", "' '")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), BLANK_AFTER_ANSWERS])
def test_a_continued_chat_has_the_ids_of_the_whole_dialogue(template):
    """First prompt, answer, continuation: the ids of the dialogue encoded at once. Pictures may come late."""
    backend = mistral_tokenizer()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    processor = replace(make(), tokenizer=Tokenizer(backend), chat_template=template)
    images = [picture(30, 40), picture(50, 20)]
    first, second = question_to_messages("What?", 1), question_to_messages("Sure?", 1)
    answer = {"role": "assistant", "content": "A cat."}
    whole = processor.chat([*first, answer, *second], images)
    start = processor.chat(first, images[:1])
    after = processor.chat_continuation([*first, answer, *second], images[1:])
    between = whole.ids[len(start.ids) : len(whole.ids) - len(after.ids)]
    assert whole.ids[: len(start.ids)] == start.ids and whole.ids[-len(after.ids) :] == after.ids
    assert processor.decode(between).strip() == "A cat."
    assert torch.equal(whole.tiles, torch.cat([start.tiles, after.tiles]))
    assert after.image_sizes == ((50, 20),)


def test_a_template_that_changes_answers_cannot_be_continued():
    template = "{% for m in messages %}{{ m.content[0].text | length }}{% endfor %}"
    processor = replace(make(), chat_template=template)
    answer = {"role": "assistant", "content": "b"}
    dialogue = [*question_to_messages("a"), answer, *question_to_messages("c")]
    with pytest.raises(InputError, match="changes the assistant's words"):
        processor.chat_continuation(dialogue)


def published_folder(folder, geometry=NEXT, processor_config=None, preprocessor_config=None, template=None):
    """The files of a checkpoint as the hub has them: each in its own file."""
    (folder / "tokenizer.json").write_text(tokenizer_json())
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    values = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    kind = "CLIPImageProcessor" if geometry.image_grid_pinpoints is None else "LlavaNextImageProcessor"
    values |= {"image_processor_type": kind, **(preprocessor_config or {})}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    if processor_config is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor_config))
    return folder


def test_a_folder_without_processor_config(tmp_path):
    """checklist 7: as old uploads are, where transformers counts one token too few."""
    processor = Processor.from_folder(published_folder(tmp_path), NEXT, IMAGE_TOKEN_ID, "mistral_instruct")
    inputs = processor.chat(question_to_messages(QUESTION, 1), [picture(480, 640)])
    assert inputs.ids.count(IMAGE_TOKEN_ID) == 2340
    assert [i for i in inputs.ids if i != IMAGE_TOKEN_ID][:6] == [1, 733, 16289, 28793, 28705, 28705]


@pytest.mark.parametrize(
    "geometry, processor_config, preprocessor_config, message",
    [
        (NEXT, {"patch_size": 16}, None, "patch_size = 16 differs from the model's 14"),
        (
            NEXT,
            {"vision_feature_select_strategy": "full"},
            None,
            "= 'full' differs from the model's 'default'",
        ),
        (NEXT, {"image_token": "<img>"}, None, "image_token = '<img>' differs from the model's '<image>'"),
        (NEXT, None, {"image_grid_pinpoints": [[336, 672]]}, r"\(\(336, 672\),\) differs from the model's"),
        (NEXT, None, {"size": 224, "crop_size": 224}, "not a multiple of the tile size 224"),
        (LLAVA, None, {"size": 224, "crop_size": 224}, "crop_size 224 differs from the model's 336"),
        (LLAVA, None, {"image_processor_type": "LlavaNextImageProcessor"}, "differs from the model's None"),
    ],
)
def test_files_that_contradict_the_model_are_refused(
    tmp_path, geometry, processor_config, preprocessor_config, message
):
    folder = published_folder(tmp_path, geometry, processor_config, preprocessor_config)
    with pytest.raises(InputError, match=message) as error:
        Processor.from_folder(folder, geometry, IMAGE_TOKEN_ID)
    assert "\n" not in str(error.value)


def test_a_folder_without_image_settings_is_refused(tmp_path):
    (published_folder(tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json: missing or empty"):
        Processor.from_folder(tmp_path, NEXT, IMAGE_TOKEN_ID)


@pytest.mark.parametrize("geometry", [SMALL, VisionGeometry(28, 14, None)])
def test_what_is_saved_loads_in_transformers_and_here(tmp_path, geometry):
    ours, image = make(geometry), picture(60, 45)
    ours.save(tmp_path)
    kind = LlavaProcessor if geometry.image_grid_pinpoints is None else LlavaNextProcessor
    theirs = kind.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(question_to_messages(QUESTION, 1), add_generation_prompt=True)
    assert text == PROMPT == ours.render(question_to_messages(QUESTION, 1))
    inputs = ours(text, [image])
    assert_equal(inputs, theirs(images=[image], text=text, return_tensors="pt"), geometry)
    again = Processor.from_folder(tmp_path, geometry, IMAGE_TOKEN_ID)
    assert again(text, [image]).ids == inputs.ids and torch.equal(again(text, [image]).tiles, inputs.tiles)
    assert again.chat_template == ours.chat_template and again.image_config == ours.image_config
    assert theirs.tokenizer.decode(inputs.ids, skip_special_tokens=True) == ours.decode(inputs.ids)


@pytest.mark.parametrize("style", ["hub", "hub without a template", "transformers 5"])
def test_a_folder_is_saved_as_it_was(tmp_path, style):
    source, target = tmp_path / "source", tmp_path / "a" / "target"
    source.mkdir()
    if style == "transformers 5":
        hf_processor(NEXT).save_pretrained(source)
    else:
        published_folder(source, template=None if "without" in style else TEMPLATES["vicuna_v1"])
    processor = Processor.from_folder(source, NEXT, IMAGE_TOKEN_ID, "mistral_instruct")
    processor.save(target)
    for path in source.iterdir():
        if path.name != "processor_config.json":
            assert (target / path.name).read_bytes() == path.read_bytes()
    counts = json.loads((target / "processor_config.json").read_text())
    assert (counts["num_additional_image_tokens"], counts["patch_size"]) == (1, 14)
    again = Processor.from_folder(target, NEXT, IMAGE_TOKEN_ID)
    assert again.chat_template == processor.chat_template and again.image_config == processor.image_config
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    again.save(target)  # onto itself
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_target_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be written"):
        make().save(tmp_path / "file")


def test_square_padding_of_the_original_llava(tmp_path):
    image_processor = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=336, do_pad=True)
    theirs = hf_processor(LLAVA, image_processor)
    theirs.save_pretrained(tmp_path)
    ours, image = Processor.from_folder(tmp_path, LLAVA, IMAGE_TOKEN_ID), picture(120, 81)
    assert ours.image_config.pad_to_square
    assert_equal(ours("<image>", [image]), theirs(images=[image], text="<image>", return_tensors="pt"), LLAVA)
