"""Chat templates: from messages to the prompt text that a checkpoint was trained on.

It knows nothing of tokens or pixels; a picture is the text `<image>` until the processor expands it. A
checkpoint's own template is Jinja and comes from strangers, so it runs in Jinja's sandbox, with the names
that Hugging Face gives to chat templates. Templates for checkpoints without one are below.
"""

import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivlm.errors import InputError
from minivlm.processor.tokens import read_json, read_text

ROLES = ("system", "user", "assistant")
# The first of these in an image part names the picture itself, as in Hugging Face's chat format.
PICTURE_KEYS = ("image", "url", "path")

# What a template from outside can raise while it runs.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
ANSWER_MARK = "\ue000answer\ue000"  # characters of private use, which no dialogue holds

# A message's pictures, each followed by a line break, and its words; every template has them in this order.
_PARTS = r"""
{%- macro pictures(message) -%}
    {%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}
{%- endmacro %}
{%- macro words(message) -%}
    {{- message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}
{%- endmacro %}
"""

# By prompt format. An answer ends as it did in training, with the end-of-text token.
TEMPLATES = {
    # LLaVA-1.6-Mistral, equal to its hub template: system text outside [INST], and a blank after </s>.
    "mistral_instruct": _PARTS
    + r"""
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '<<SYS>>\n' + words(message) + '\n<</SYS>>\n\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + pictures(message) + words(message) + ' [/INST]' }}
    {%- else %}
        {{- ' ' + words(message) + eos_token + ' ' }}
    {%- endif %}
{%- endfor %}""",
    # LLaVA-1.5 and LLaVA-1.6-Vicuna. As on the hub there is no system text unless one is given; the original
    # code always writes "A chat between a curious human and an artificial intelligence assistant. ..."
    "vicuna_v1": _PARTS
    + r"""
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- words(message) + ' ' }}
    {%- elif message['role'] == 'user' %}
        {{- 'USER: ' + pictures(message) + words(message) + ' ' }}
    {%- else %}
        {{- 'ASSISTANT: ' + words(message) + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    # LLaVA-1.6-34B (Yi): the system text it was trained with, unless another is given.
    "chatml_direct": _PARTS
    + r"""
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nAnswer the questions.<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + pictures(message) + words(message) + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    # BakLLaVA-1: a line a turn.
    "bakllava": _PARTS
    + r"""
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- words(message) + '\n' }}
    {%- elif message['role'] == 'user' %}
        {{- 'USER: ' + pictures(message) + words(message) + '\n' }}
    {%- else %}
        {{- 'ASSISTANT: ' + words(message) + eos_token + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
}

Message = dict[str, Any]


def question_to_messages(question: str, n_images: int = 0) -> list[Message]:
    """One user message: n_images pictures, then the question."""
    content: list[dict[str, str]] = [{"type": "image"}] * n_images
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def normalise(messages: Sequence[Message]) -> list[Message]:
    """Messages whose content is a list of {"type": "text", "text": str} and {"type": "image"}, checked.

    Content may also be one string, and a part may carry nulls and an index (`{"index": 0, "text": None,
    "type": "image"}`, as data sets write it). Raises InputError that names the message and the part.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise InputError(f"messages: expected a list of at least one message, found {messages!r:.80}")
    return [_normal_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def pictures(messages: Sequence[Message]) -> list[Any]:
    """The pictures that parts of the messages name themselves, in reading order; [] if none does.

    Raises InputError if only some image parts name one: where the other pictures belong would be a guess.
    """
    normalise(messages)
    lists = [message["content"] for message in messages if not isinstance(message["content"], str)]
    parts = [part for content in lists for part in content if part["type"] == "image"]
    named = [[part[key] for key in PICTURE_KEYS if part.get(key) is not None] for part in parts]
    sources = [names[0] for names in named if names]
    if sources and len(sources) != len(parts):
        raise InputError(f"messages: {len(sources)} of {len(parts)} image parts name a picture, expected all or none")
    return sources


def render(
    messages: Sequence[Message],
    template: str,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The prompt text of a dialogue. Raises InputError for bad messages and for what the template refuses.

    add_generation_prompt: end with the words that make the assistant answer (templates may have none).
    """
    names = {
        "messages": normalise(messages),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",  # a token that does not exist renders as nothing
        "eos_token": eos_token or "",
        "tools": None,  # Hugging Face's templates may ask for these two
        "documents": None,
    }
    try:
        return _compile(template).render(names)
    except TEMPLATE_ERRORS as error:
        raise InputError(f"chat template: {' '.join(str(error).split())}") from None


def mark_last_answer(messages: Sequence[Message]) -> list[Message]:
    """The messages with ANSWER_MARK in place of the last answer's words; a further message must follow it.

    What a template renders after the mark is what a chat that keeps its cache appends to an answer.
    Example (Mistral), if "Sure?" follows the answer: "</s> [INST] Sure? [/INST]".
    """
    messages = normalise(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == len(messages) - 1:
        raise InputError("messages: expected an answer of the assistant and then a further message")
    messages[answers[-1]] = {"role": "assistant", "content": [{"type": "text", "text": ANSWER_MARK}]}
    return messages


def template_of_folder(folder: Path, prompt_format: str | None) -> str | None:
    """The chat template of a checkpoint folder, else the built-in one of `prompt_format`, else None.

    In order: processor_config.json, chat_template.json, chat_template.jinja, tokenizer_config.json.
    """
    if prompt_format is not None and prompt_format not in TEMPLATES:
        raise InputError(f"prompt format {prompt_format!r}, expected one of {', '.join(TEMPLATES)}")
    for name in ("processor_config.json", "chat_template.json"):
        if template := _named_template(read_json(folder / name).get("chat_template"), folder / name):
            return template
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    path = folder / "tokenizer_config.json"
    if template := _named_template(read_json(path).get("chat_template"), path):
        return template
    return None if prompt_format is None else TEMPLATES[prompt_format]


def _named_template(value: Any, path: Path) -> str | None:
    """A template is a string, or several as a list of {"name", "template"}; "default" is for chat."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), value)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path}: chat_template is {value!r:.80}, expected a string or one named 'default'")
    return value


def _normal_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise InputError(f"{where}: expected an object with role and content, found {message!r:.80}")
    if unknown := sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None):
        raise InputError(f"{where}: {unknown[0]} is not supported, expected role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"{where}: role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise InputError(f"{where}: content is {content!r:.80}, expected a string or a list of parts")
    parts = [_normal_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise InputError(f"{where}: a picture in a message of the {role}, expected it in one of the user")
    return {"role": role, "content": parts}


def _normal_part(part: Any, where: str) -> dict[str, str]:
    if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
        raise InputError(f"{where}: expected type 'text' or 'image', found {part!r:.80}")
    given = {key for key, value in part.items() if value is not None} - {"type", "index"}
    if part["type"] == "image":
        if unknown := sorted(given - set(PICTURE_KEYS)):
            raise InputError(
                f"{where}: {unknown[0]} in an image part, expected at most one of {', '.join(PICTURE_KEYS)}"
            )
        return {"type": "image"}
    if given != {"text"} or not isinstance(part["text"], str):
        raise InputError(f"{where}: a text part with {', '.join(sorted(given)) or 'nothing'}, expected only a text")
    return {"type": "text", "text": part["text"]}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words; they are rendered as they are."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"chat template: {' '.join(str(error).split())}") from None
