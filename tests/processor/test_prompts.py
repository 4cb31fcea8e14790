"""Chat templates against transformers' rendering, and messages of every spelling."""

import json
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minivlm.errors import InputError
from minivlm.processor.prompts import (
    ANSWER_MARK,
    TEMPLATES,
    mark_last_answer,
    normalise,
    pictures,
    question_to_messages,
    render,
    template_of_folder,
)

# In the form in which the hub has it for llava-v1.6-mistral-7b.
HUB_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# In the form in which the hub has it for llava-1.5-7b: with marks around the assistant's words.
HUB_VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def said(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


# A template as it is written by hand, which depends on blocks leaving no lines and no indentation behind.
INDENTED = """
{% for message in messages %}
    {% if message['role'] == 'user' %}
user: {{ message['content'][-1]['text'] }}
    {% endif %}
{% endfor %}
assistant:
"""


DIALOGUES = [
    [said("user", "What is shown in this image?", 1)],
    [said("user", "No picture.")],
    [said("user", "Compare.", 3)],
    [said("system", "Be brief."), said("user", "Hi", 1)],
    [said("user", "What?", 1), said("assistant", "A cat."), said("user", "Sure?", 1)],
    [said("user", 'a <b> "c" {{ d }} {% e %}\n\nf', 1)],
    [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        }
    ],
]


def transformers_render(messages, template, add_generation_prompt):
    (text,), _ = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return text


@pytest.mark.parametrize("messages", DIALOGUES)
@pytest.mark.parametrize("template", [HUB_MISTRAL, HUB_VICUNA, INDENTED, *TEMPLATES.values()])
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(messages, template, prompt):
    assert render(messages, template, prompt, "<s>", "</s>") == transformers_render(messages, template, prompt)


@pytest.mark.parametrize("messages", DIALOGUES)
def test_the_built_in_mistral_template_equals_the_hubs(messages):
    ours = render(messages, TEMPLATES["mistral_instruct"], eos_token="</s>")
    assert ours == render(messages, HUB_MISTRAL, eos_token="</s>")


@pytest.mark.parametrize(
    "name, one, two",
    [
        (
            "mistral_instruct",
            "[INST] <image>\nWhat is shown in this image? [/INST]",
            "[INST] <image>\nWhat? [/INST] A cat.</s> [INST] <image>\nSure? [/INST]",
        ),
        (
            "vicuna_v1",
            "USER: <image>\nWhat is shown in this image? ASSISTANT:",
            "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: <image>\nSure? ASSISTANT:",
        ),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
            "What is shown in this image?<|im_end|><|im_start|>assistant\n",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
            "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\n<image>\nSure?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "bakllava",
            "USER: <image>\nWhat is shown in this image?\nASSISTANT:",
            "USER: <image>\nWhat?\nASSISTANT: A cat.</s>\nUSER: <image>\nSure?\nASSISTANT:",
        ),
    ],
)
def test_the_prompts_the_checkpoints_were_trained_on(name, one, two):
    assert render(question_to_messages("What is shown in this image?", 1), TEMPLATES[name]) == one
    assert render(DIALOGUES[4], TEMPLATES[name], eos_token="</s>") == two


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_dialogue_begins_with_its_own_first_prompt(name):
    """So that labels can be the rest: the prompt that serves is a prefix of the dialogue that trains."""
    prompt = render(DIALOGUES[4][:1], TEMPLATES[name])
    whole = render(DIALOGUES[4][:2], TEMPLATES[name], add_generation_prompt=False, eos_token="</s>")
    assert whole.startswith(prompt) and whole[len(prompt) :].strip() in ("A cat.</s>", "A cat.<|im_end|>")


def test_spellings_of_messages():
    expected = [said("user", "Hi")]
    assert normalise([{"role": "user", "content": "Hi"}]) == expected
    filled = [{"index": None, "text": "Hi", "type": "text"}]
    assert normalise([{"role": "user", "content": filled, "name": None}]) == expected
    filled = [{"index": 0, "text": None, "type": "image"}, {"index": None, "text": "Hi", "type": "text"}]
    assert normalise([{"role": "user", "content": filled}]) == [said("user", "Hi", 1)]


def test_pictures_named_in_messages():
    parts = [{"type": "image", "url": "a"}, {"type": "image", "path": "b"}, {"type": "image", "image": b"c"}]
    assert pictures([{"role": "user", "content": parts}, said("assistant", "x")]) == ["a", "b", b"c"]
    assert pictures([said("user", "x", 2), {"role": "user", "content": "y"}]) == []
    with pytest.raises(InputError, match="2 of 3 image parts name a picture"):
        pictures([{"role": "user", "content": [*parts[:2], {"type": "image"}]}])


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "expected a list of at least one message"),
        ("Hi", "expected a list of at least one message"),
        (["Hi"], r"messages\[0\]: expected an object with role and content"),
        ([{"role": "user"}], r"messages\[0\]: expected an object with role and content"),
        ([{"role": "tool", "content": "x"}], "role 'tool', expected one of system, user, assistant"),
        ([{"role": "user", "content": None}], "content is None"),
        ([{"role": "user", "content": []}], r"content is \[\]"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls is not supported"),
        (
            [said("user", "x"), {"role": "assistant", "content": [{"type": "image"}]}],
            r"messages\[1\]: a picture",
        ),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            r"content\[0\]: expected type 'text' or 'image'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "a text part with nothing"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "a text part with text"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "text in an image part"),
    ],
)
def test_bad_messages_are_refused(messages, message):
    with pytest.raises(InputError, match=message) as error:
        render(messages, TEMPLATES["vicuna_v1"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no\nsuch role') }}", "chat template: no such role"),
        ("{% for %}", "chat template: "),
        ("{{ messages[0].role.nothing.more }}", "chat template: "),
        ("{{ messages + 1 }}", "chat template: "),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ range(10**9) }}", "chat template: "),
        ("{{ 1 // 0 }}", "chat template: "),
    ],
)
def test_templates_that_fail_or_misbehave_give_one_line(template, message):
    with pytest.raises(InputError, match=message) as error:
        render(question_to_messages("Hi"), template)
    assert "\n" not in str(error.value)


def test_names_that_templates_may_use():
    messages = question_to_messages("é<")
    assert render(messages, "{{ messages[0].content[0] | tojson }}") == '{"type": "text", "text": "é<"}'
    assert render(messages, "{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render(messages, "{% if tools is none and documents is none %}ok{% endif %}") == "ok"
    assert render(messages, "{{ bos_token }}a{{ eos_token }}", True, "<s>", None) == "<s>a"
    loop = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(messages, loop) == "1"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_follows_an_answer(name):
    dialogue = [*DIALOGUES[4], said("assistant", "Yes."), said("user", "Why?")]
    marked = render(mark_last_answer(dialogue), TEMPLATES[name], eos_token="</s>")
    assert marked.replace(ANSWER_MARK, "Yes.") == render(dialogue, TEMPLATES[name], eos_token="</s>")
    assert marked.count(ANSWER_MARK) == 1
    for messages in ([said("user", "x")], DIALOGUES[4][:2]):
        with pytest.raises(InputError, match="expected an answer of the assistant and then"):
            mark_last_answer(messages)


def test_where_a_folder_has_its_template(tmp_path):
    """The files in the order in which transformers prefers them, last the built-in one the caller names."""

    def write(name, value):
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    assert template_of_folder(tmp_path, None) is None
    assert template_of_folder(tmp_path, "vicuna_v1") == TEMPLATES["vicuna_v1"]
    with pytest.raises(InputError, match="prompt format 'alpaca', expected one of mistral_instruct"):
        template_of_folder(tmp_path, "alpaca")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "tokenizer"}]
    write("tokenizer_config.json", {"chat_template": named})
    assert template_of_folder(tmp_path, "vicuna_v1") == "tokenizer"
    write("chat_template.jinja", "jinja")
    assert template_of_folder(tmp_path, None) == "jinja"
    write("chat_template.json", {"chat_template": "json"})
    assert template_of_folder(tmp_path, None) == "json"
    write("processor_config.json", {"chat_template": "processor"})
    assert template_of_folder(tmp_path, None) == "processor"
    write("processor_config.json", {"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(InputError, match="expected a string or one named 'default'"):
        template_of_folder(tmp_path, None)
