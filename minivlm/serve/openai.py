"""OpenAI's requests and responses: chat and completions, each translated into TGI's parameters."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from minivlm.sampler import LARGEST_BIAS
from minivlm.serve import tools as calls
from minivlm.serve.errors import Refused, invalid
from minivlm.serve.parameters import Form, Parameters, Rule, Schema, TextForm
from minivlm.serve.tgi import SimpleToken, StreamResponse
from minivlm.serve.tools import Choice, Tool

MOST_BIASED = 1024  # every token of the answer costs time for each of them

# ---- requests


class ImageUrl(Schema):
    """Where a picture is; `detail` makes no difference."""

    url: str
    detail: str | None = None


class ImagePart(Schema):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Schema):
    """Words in a message."""

    type: Literal["text"]
    text: str


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class FunctionCall(Schema):
    """A call that the assistant made."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A call that the assistant made, with its id."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Schema):
    """One message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class StreamOptions(Schema):
    """include_usage: a last chunk with the numbers of tokens."""

    include_usage: bool | None = False


class OpenAIRequest(Schema):
    """What the two ways of asking share. `model` is not looked at: one model is served."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: Annotated[float | None, Rule("`temperature` must be 0, which is greedy, or positive", ge=0)] = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: Annotated[float | None, Rule("`presence_penalty` must be >= -2.0 and <= 2.0",
                                                   ge=-2, le=2)] = None  # fmt: skip
    logit_bias: dict[str, float] | None = None
    n: Annotated[int | None, Rule("`n` must be > 0 and <= {max_best_of}. Given: {value}",
                                  gt=0, le="max_best_of")] = None  # fmt: skip
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def each(self) -> int:
        """The number of answers to a prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def common(self) -> dict[str, Any]:
        """The fields of `ShiftedParameters` that come from here. OpenAI samples at 1 unless told, and 0 is greedy."""
        greedy = self.temperature == 0
        return {
            "temperature": None if greedy else self.temperature,
            "do_sample": not greedy,
            "top_p": None if greedy or self.top_p == 1 else self.top_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": bias_of(self.logit_bias or {}),
            "seed": self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
        }


def bias_of(asked: dict[str, float]) -> dict[int, float]:
    """`logit_bias` by number. Raises 422 for the first that is none; what is beyond the vocabulary is told later."""
    if len(asked) > MOST_BIASED:
        raise invalid(f"`logit_bias`: found {len(asked)} ids, expected at most {MOST_BIASED}")
    for key, value in asked.items():
        if not re.fullmatch("0|[1-9][0-9]{0,17}", key):
            raise invalid(f"`logit_bias`: found the key {key[:20]!r}, expected the id of a token, a whole number")
        if not -LARGEST_BIAS <= value <= LARGEST_BIAS:
            expected = f"a number from {-LARGEST_BIAS} to {LARGEST_BIAS}"
            raise invalid(f"`logit_bias` of {key}: found {value:.12g}, expected {expected}")
    return {int(key): value for key, value in asked.items()}


class ShiftedParameters(Parameters):
    """TGI's terms, and what OpenAI's requests have beyond them."""

    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    @property
    def shifts(self) -> dict[str, Any]:
        """The fields of `Sampling` that add to scores."""
        return super().shifts | {"presence_penalty": self.presence_penalty or 0.0, "logit_bias": self.logit_bias or {}}


class ChatRequest(OpenAIRequest):
    """A dialogue to be answered; if its last message is the assistant's, that message is continued."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    repetition_penalty: float | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    response_format: Form | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | str | Choice | None = None
    tool_prompt: str | None = None

    @property
    def offered(self) -> list[Tool]:
        """The tools that the answer may call."""
        return calls.offered(self.tools or [], self.tool_choice)

    def parameters(self) -> Parameters:
        """The same request in TGI's terms."""
        form, tools = self.response_format, self.offered
        if tools and form is not None and not isinstance(form, TextForm):
            raise invalid("`tools` and `response_format` exclude each other")
        if self.top_logprobs and not self.logprobs:
            raise invalid("`top_logprobs` is set, expected `logprobs` to be true")
        if tools:
            schema = calls.schema_of(tools, may_talk=self.tool_choice in (None, "auto"))
            form = {"type": "json", "value": schema}
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return ShiftedParameters(**self.common(), max_new_tokens=limit, repetition_penalty=self.repetition_penalty,
                                 top_n_tokens=self.top_logprobs, grammar=form)  # fmt: skip


class CompletionRequest(OpenAIRequest):
    """Prompts to be continued, pictures in them as on TGI's routes.

    The fields of TGI's `parameters` are taken here too: @huggingface/inference sends them at the top level.
    """

    prompt: str | list[str]
    suffix: str | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    top_k: int | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = None
    grammar: Form | None = None
    response_format: Form | None = None
    adapter_id: str | None = None

    def parameters(self) -> Parameters:
        """The same request in TGI's terms."""
        if self.suffix is not None:
            raise Refused(422, "Suffix is not supported: write the whole prompt in `prompt`", "suffix not supported")
        if self.best_of is not None and self.best_of != self.each:
            raise invalid("`best_of` other than `n` is not supported here, expected /generate")
        own = ("top_k", "typical_p", "repetition_penalty", "truncate", "watermark", "details", "decoder_input_details",
               "grammar", "adapter_id")  # fmt: skip
        values = self.common() | {name: vars(self)[name] for name in own}
        limit = self.max_tokens if self.max_tokens is not None else self.max_new_tokens
        values |= {"max_new_tokens": limit, "return_full_text": self.echo or self.return_full_text}
        values["top_n_tokens"] = self.top_n_tokens if self.logprobs is None else self.logprobs
        if self.temperature == 0:
            values["top_k"] = values["typical_p"] = None
        if self.do_sample is False:  # said, not left out: then greedy unless another parameter implies sampling
            values["do_sample"] = False
        if self.grammar is None:
            values["grammar"] = self.response_format
        return ShiftedParameters(**values)


# ---- responses

Reason = Literal["stop", "length", "tool_calls"]
REASONS: dict[str, Reason] = {"stop": "stop", "stop_string": "stop", "length": "length"}  # by the engine's words


class Usage(Schema):
    """Tokens of the prompt, image tokens included, and of the answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(Schema):
    """A token with its log-probability in the model's own distribution; bytes: of its text, if it has one."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(Likely):
    """A token of the answer, and the likeliest at its place."""

    top_logprobs: list[Likely]


class ChatLogprobs(Schema):
    """The answer's tokens."""

    content: list[ChatLogprob]


class AssistantMessage(Schema):
    """The answer: words or calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Schema):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class Envelope(Schema):
    """What every answer comes in."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Envelope):
    """The answers to a dialogue."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Schema):
    """What is new of a call; its name comes first."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Schema):
    """What is new of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Schema):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Schema):
    """What is new of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(Envelope):
    """One event of a chat's stream; the last may have no choice but the usage."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Schema):
    """The tokens of a completion, and where their texts begin."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Schema):
    """One of the completions, or what is new of it; finish_reason is "" before the end, as in TGI."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", ""]


class Completion(Envelope):
    """The completions of the prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Envelope, StreamResponse):
    """One event of a completion's stream in two shapes at once: OpenAI's, and that of TGI's `/generate_stream`.

    @huggingface/inference 4 reads `/v1/completions`, and the programs that use it read `token.text`.
    """

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionUsage(Envelope):
    """The last event of a completion's stream, if it was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice] = Field(max_length=0)
    usage: Usage


class Model(Schema):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class Models(Schema):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ChatTokens(Schema):
    """The text that a dialogue becomes, and its tokens."""

    tokenize_response: list[SimpleToken]
    templated_text: str
