"""TGI's `parameters`, as data: every field with its type, its default, its rule and what is said when it is broken.

OpenAI's routes translate their fields into these, as TGI does, so a rule is written once.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from minivlm.answer import Options
from minivlm.sampler import Sampling
from minivlm.serve.errors import invalid
from minivlm.serve.limits import Limits


class Schema(BaseModel):
    """JSON of a client: types are exact ("1" is no number), unknown fields are ignored, as TGI does."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    def check_rules(self, limits: Limits) -> None:
        """Raises 422, in TGI's words, for the first field that breaks its rule."""
        for name, info in type(self).model_fields.items():
            for rule in info.metadata:
                if isinstance(rule, Rule):
                    rule.check(vars(self)[name], limits)


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type. The message may name {value} and any of the server's limits.

    gt, ge, lt, le: as in JSON schema; a string is the name of a limit. of_length: of a list, its length is meant.
    """

    message: str
    gt: float | None = None
    ge: float | None = None
    lt: float | str | None = None
    le: float | str | None = None
    of_length: bool = False

    def check(self, value: Any, limits: Limits) -> None:
        """Raises 422 with the message if the value breaks the rule; None is a field that was not given."""
        if value is None:
            return
        value = len(value) if self.of_length else value
        bounds = {name: vars(limits)[bound] if isinstance(bound, str) else bound for name, bound in self._bounds()}
        broken = (
            value <= bounds.get("gt", value - 1)
            or value < bounds.get("ge", value)
            or value >= bounds.get("lt", value + 1)
            or value > bounds.get("le", value)
        )
        if broken:
            raise invalid(self.message.format(value=value, **vars(limits)))

    def _bounds(self) -> list[tuple[str, float | str]]:
        given = {"gt": self.gt, "ge": self.ge, "lt": self.lt, "le": self.le}
        return [(name, bound) for name, bound in given.items() if bound is not None]

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The fixed bounds, for the OpenAPI document."""
        schema = handler(core)
        names = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
        numbers = [part for part in schema.get("anyOf", [schema]) if part.get("type") in ("integer", "number")]
        for part in numbers:
            part |= {names[name]: bound for name, bound in self._bounds() if not isinstance(bound, str)}
        return schema


def _schema_text(value: Any) -> Any:
    """TGI takes a JSON schema as JSON or as a string of JSON."""
    return json.loads(value) if isinstance(value, str) else value


JsonSchema = Annotated[dict[str, Any], BeforeValidator(_schema_text, json_schema_input_type=dict[str, Any] | str)]


class Named(Schema):
    """A schema with a name, as OpenAI writes it. `strict` makes no difference: an answer always follows its schema."""

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class JsonForm(Schema):
    """TGI's JSON schema."""

    type: Literal["json"]
    value: JsonSchema


class JsonObjectForm(Schema):
    """OpenAI's "any object", or TGI's and huggingface_hub's name for a JSON schema."""

    type: Literal["json_object"]
    value: JsonSchema = {"type": "object"}


class JsonSchemaForm(Schema):
    """OpenAI's JSON schema in `json_schema`; TGI has the same in `value`."""

    type: Literal["json_schema"]
    json_schema: Named | None = None
    value: Named | None = None


class RegexForm(Schema):
    """A regular expression that the whole answer matches."""

    type: Literal["regex"]
    value: str


class TextForm(Schema):
    """OpenAI's way to ask for no grammar."""

    type: Literal["text"]


Form = Annotated[JsonForm | JsonObjectForm | JsonSchemaForm | RegexForm | TextForm, Field(discriminator="type")]


def grammar_of(form: Form | None) -> tuple[Literal["json", "regex"], dict[str, Any] | str] | None:
    """What `grammar` or `response_format` asks for: a kind and its schema or expression."""
    match form:
        case None | TextForm():
            return None
        case RegexForm(value=value):
            return "regex", value
        case JsonForm(value=value) | JsonObjectForm(value=value):
            return "json", value
        case JsonSchemaForm(json_schema=schema, value=value):
            if schema is None and value is None:
                raise invalid("grammar is not valid: `json_schema` is missing")
            return "json", (schema or value).schema_


UNIT = "must be > 0.0 and < 1.0"


class Parameters(Schema):
    """How an answer is made. Absent or null is the default; without any of them the answer is greedy."""

    best_of: Annotated[int | None, Rule("`best_of` must be > 0 and <= {max_best_of}. Given: {value}",
                                        gt=0, le="max_best_of")] = None  # fmt: skip
    # TGI's bound is 0; below 1e-10 scores overflow float32.
    temperature: Annotated[float | None, Rule("`temperature` must be strictly positive", ge=1e-10)] = None
    repetition_penalty: Annotated[float | None, Rule("`repetition_penalty` must be strictly positive",
                                                     ge=1e-10, le=1e10)] = None  # fmt: skip
    frequency_penalty: Annotated[float | None, Rule("`frequency_penalty` must be >= -2.0 and <= 2.0",
                                                    ge=-2, le=2)] = None  # fmt: skip
    top_k: Annotated[int | None, Rule("`top_k` must be strictly positive", gt=0)] = None
    top_p: Annotated[float | None, Rule(f"`top_p` {UNIT}", gt=0, lt=1)] = None
    typical_p: Annotated[float | None, Rule(f"`typical_p` {UNIT}", gt=0, lt=1)] = None
    do_sample: bool | None = False
    max_new_tokens: Annotated[int | None, Rule("`max_new_tokens` must be strictly positive", gt=0)] = None
    return_full_text: bool | None = None
    stop: Annotated[list[str] | None, Rule("`stop` supports up to {max_stop_sequences} stop sequences. Given: {value}",
                                           le="max_stop_sequences", of_length=True)] = []  # fmt: skip
    truncate: Annotated[int | None, Rule("`truncate` must be strictly positive and less than {max_input_tokens}. "
                                         "Given: {value}", gt=0, lt="max_input_tokens")] = None  # fmt: skip
    watermark: bool | None = False
    details: bool | None = False
    decoder_input_details: bool | None = False
    seed: Annotated[int | None, Rule("`seed` must be from 0 to 2**64 - 1", ge=0, lt=2**64)] = None
    top_n_tokens: Annotated[int | None, Rule("`top_n_tokens` must be >= 0 and <= {max_top_n_tokens}. Given: {value}",
                                             ge=0, le="max_top_n_tokens")] = None  # fmt: skip
    grammar: Form | None = None
    adapter_id: str | None = None

    def check(self, limits: Limits, stream: bool) -> None:
        """Raises 422, in TGI's words, for the first rule that is broken, of one field or between several."""
        self.check_rules(limits)
        several = (self.best_of or 1) > 1
        for broken, message in (
            (several and not self.sampling, "you must use sampling when `best_of` is > 1"),
            (several and self.seed is not None, "`seed` must not be set when `best_of` > 1"),
            (several and stream, "`best_of` != 1 is not supported when streaming tokens"),
            (self.decoder_input_details and stream,
             "`decoder_input_details` == true is not supported when streaming tokens"),
            ("" in (self.stop or []), "`stop` holds an empty string"),
            (self.watermark, "`watermark` is not supported"),
            (self.adapter_id is not None, "`adapter_id` is not supported"),
        ):  # fmt: skip
            if broken:
                raise invalid(message)

    @property
    def sampling(self) -> bool:
        """Whether ids are drawn: asked for, or implied by a parameter that matters only then."""
        implying = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return bool(self.do_sample) or any(value is not None for value in implying)

    @property
    def shifts(self) -> dict[str, Any]:
        """The fields of `Sampling` that add to scores; OpenAI's requests have more of them."""
        return {"frequency_penalty": self.frequency_penalty or 0.0}

    def options(self, number: int = 0) -> Options:
        """What the engine needs of them; number: which of several answers, each with a seed of its own."""
        drawn: dict[str, Any] = {}
        if self.sampling:
            temperature = 1.0 if self.temperature is None else self.temperature
            seed = None if self.seed is None else (self.seed + number) % 2**64
            drawn = {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": seed}
            drawn["typical_p"] = self.typical_p
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        sampling = Sampling(**drawn, repetition_penalty=penalty, top_logprobs=self.top_n_tokens or 0, **self.shifts)
        return Options(sampling, self.max_new_tokens, tuple(self.stop or ()))
