"""Guided answers end valid, whatever is drawn and however few tokens there are: checked by jsonschema and re."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

import minivlm
from minivlm.errors import InputError
from minivlm.serve.grammar import GrammarGuide, compile_grammar

TREE = {
    "$defs": {
        "node": {
            "properties": {"name": {"type": "string"}, "below": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["name", "below"],
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS = {
    # As text-generation-inference's documents have it: without a type.
    "documents": {
        "properties": {
            "location": {"title": "Location", "type": "string"},
            "activity": {"title": "Activity", "type": "string"},
            "animals_seen": {"maximum": 5, "minimum": 1, "title": "Animals Seen", "type": "integer"},
            "animals": {"items": {"type": "string"}, "title": "Animals", "type": "array"},
        },
        "required": ["location", "activity", "animals_seen", "animals"],
    },
    "tree": TREE,
    "numbers": {"type": "array", "minItems": 2, "maxItems": 4, "items": {"type": "number", "minimum": 0.5}},
    "choice": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "formats": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "long": {"type": "string", "minLength": 12, "maxLength": 30},
            "maybe": {"anyOf": [{"type": "integer", "multipleOf": 7, "minimum": 10}, {"type": "null"}]},
        },
        "required": ["day", "code", "long", "maybe"],
    },
    "both": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    "anything": {},
    "any object": {"type": "object"},
}
REGEXES = ["yes|no", " with a blank first", r"\d{4}-\d{2}", r"[a-z]{3,9}\.(png|jpg)", ".*END", "é+ü?", "a*"]


@pytest.fixture(scope="module")
def vlm() -> minivlm.Pipeline:
    return minivlm.load(device="cpu", dtype="float32")


def compiled(vlm: minivlm.Pipeline, kind: str, value):
    return compile_grammar(kind, value, vlm.processor.tokenizer, vlm.vocabulary)


def ids_of(guide: GrammarGuide, size: int) -> list[int]:
    bits = np.unpackbits(guide.bitmask().numpy().view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return bits[:size].nonzero()[0].tolist()


def drawn(vlm: minivlm.Pipeline, guide: GrammarGuide, limit: int, rng: random.Random) -> str:
    """A text of at most `limit` ids, each drawn from what the guide allows, by the batch's rules."""
    ids, vocabulary = [], vlm.vocabulary
    while len(ids) < limit:
        left = limit - len(ids) - 1
        token_id = rng.choice(ids_of(guide, vocabulary.size))
        if not guide.accept(token_id, left):
            (token_id,) = ids_of(guide, vocabulary.size)  # one way out
            assert guide.accept(token_id, left)
        assert vocabulary.allowed[token_id]
        if token_id in vocabulary.eos_ids:
            break
        ids.append(token_id)
        if guide.complete:
            break
    before = vlm.processor.tokenizer.encode("a", add_bos=False)
    return vlm.processor.decode([*before, *ids])[1:]


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid_at_every_length(vlm, name):
    schema, rng = SCHEMAS[name], random.Random(name)
    grammar = compiled(vlm, "json", schema)
    jsonschema.validate(json.loads(grammar.path), schema)
    for limit in [*range(grammar.minimum, grammar.minimum + 25), grammar.minimum + 100]:
        text = drawn(vlm, grammar.guide(), limit, rng)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_matches_at_every_length(vlm, regex):
    grammar, rng = compiled(vlm, "regex", regex), random.Random(regex)
    for limit in range(grammar.minimum, grammar.minimum + 25):
        text = drawn(vlm, grammar.guide(), limit, rng)
        assert re.fullmatch(regex, text), (limit, text)


def test_one_token_fewer_than_the_minimum_would_not_do(vlm):
    """The smallest texts, found by hand, need as many tokens as are said to be the minimum."""
    for kind, value, text in (("json", SCHEMAS["tree"], '{"name": "", "below": []}'), ("regex", "yes|no", "no")):
        grammar = compiled(vlm, kind, value)
        tokens = len(vlm.processor.tokenizer.encode_after(text))
        assert grammar.path == text.encode() and grammar.minimum <= tokens


def fields(number: int, schema: dict) -> dict:
    names = [f"k{i}" for i in range(number)]
    return {"type": "object", "properties": dict.fromkeys(names, schema), "required": names}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


@pytest.mark.parametrize(
    "schema, longest",
    [
        *((fields(n, STRING), json.dumps({f"k{i}": "" for i in range(n)})) for n in (20, 150)),
        (fields(100, STRING) | {"required": ["k99"]}, '{"k99": ""}'),
        (fields(100, INTEGER), json.dumps({f"k{i}": 0 for i in range(100)})),
        (fields(10, STRING | {"format": "email"}), json.dumps({f"k{i}": "a@b" for i in range(10)})),
        (
            {"type": "array", "minItems": 8, "items": fields(3, STRING)},
            json.dumps([{"k0": "", "k1": "", "k2": ""}] * 8),
        ),
        ({"type": "array", "minItems": 50, "items": fields(3, NUMBER)}, json.dumps([{"k0": 0, "k1": 0, "k2": 0}] * 50)),
    ],
    ids=["20 strings", "150 strings", "optional", "integers", "emails", "8 objects", "50 objects"],
)
def test_the_path_of_a_long_schema_is_no_longer_than_one_by_hand(vlm, schema, longest):
    grammar = compiled(vlm, "json", schema)
    jsonschema.validate(json.loads(longest), schema)
    jsonschema.validate(json.loads(grammar.path), schema)
    assert len(grammar.path) <= len(longest)
    assert grammar.minimum <= len(grammar.path)
    text = drawn(vlm, grammar.guide(), grammar.minimum + 5, random.Random(7))
    jsonschema.validate(json.loads(text), schema)


def test_a_key_has_one_spelling(vlm):
    """An escaped `a` would be any other key to the matcher, and the declared one to who reads the answer."""
    schema = {"properties": {"a": INTEGER, "b/": INTEGER}, "additionalProperties": STRING}
    grammar = compiled(vlm, "json", schema)
    for text, fits in (
        ('{"a": 1, "c": "x"}', True),
        ('{"a": 1, "a": "x"}', False),
        (r'{"a": 1, "\u0061": "x"}', False),
        (r'{"\u0061": "x"}', False),
        (r'{"b\/": "x"}', False),
    ):
        ids = grammar.words.one_by_one(text.encode())
        assert (grammar.matcher.validate_tokens(ids) == len(ids)) == fits, text


def test_a_required_name_that_is_not_declared_keeps_an_object_open(vlm):
    for schema in ({"properties": {"a": INTEGER}, "required": ["z"]}, fields(2, STRING) | {"required": ["z", "k0"]}):
        jsonschema.validate(json.loads(compiled(vlm, "json", schema).path), schema)


def test_all_of_as_a_text_is_no_keyword(vlm):
    schema = {"description": "allOf", "properties": {"allOf": STRING, "b": {"const": "allOf"}}, "required": ["b"]}
    matcher = compiled(vlm, "json", schema).matcher
    ids = compiled(vlm, "json", schema).words.one_by_one(b'{"c')
    assert matcher.validate_tokens(ids) < len(ids)


def test_objects_that_name_properties_are_objects_of_those(vlm):
    """A schema without a type would allow a bare string, and one without a word on others any key."""
    guide = compiled(vlm, "json", SCHEMAS["documents"]).guide()
    assert {vlm.processor.tokenizer.backend.id_to_token(i)[0] for i in ids_of(guide, vlm.vocabulary.size)} == {"{"}
    rng = random.Random(0)
    for _ in range(5):
        text = drawn(vlm, compiled(vlm, "json", SCHEMAS["tree"]).guide(), 60, rng)
        assert set(json.loads(text)) == {"name", "below"}
    free = compiled(vlm, "json", {"properties": {}, "additionalProperties": {"type": "integer"}})
    assert any(json.loads(drawn(vlm, free.guide(), 40, rng)) for _ in range(5))


def test_blanks_are_those_of_json_dumps(vlm):
    rng = random.Random(2)
    for _ in range(5):
        text = drawn(vlm, compiled(vlm, "json", SCHEMAS["numbers"]).guide(), 50, rng)
        assert not re.search(r"\s(?<!, )|,(?! )", text)


def test_a_matcher_that_gives_up_does_not_keep_the_answer_from_its_end(vlm):
    """Its limits may be hit at any id; then the rest is the path that was known before."""
    schema, rng = SCHEMAS["documents"], random.Random(3)
    for steps in range(0, 40, 3):
        guide = compiled(vlm, "json", schema).guide()
        text, matcher, count = "", guide._matcher, 0

        class Broken:
            def __getattr__(self, name, matcher=matcher, steps=steps):
                nonlocal count
                count += name == "unsafe_compute_mask_ptr"
                if count > steps:
                    if name == "is_error":
                        return lambda: True
                    if name in ("consume_token", "rollback"):
                        return lambda _: False
                    if name == "validate_tokens":
                        return lambda _: 0
                    if name in ("is_accepting", "is_stopped"):
                        return lambda: False
                return matcher.__getattribute__(name)

        guide._matcher = Broken()
        text = drawn(vlm, guide, 80, rng)
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    "kind, value, message",
    [
        ("json", "{", "the schema is not JSON"),
        ("json", "[1]", "the schema is list, expected an object"),
        ("json", {"type": "bogus"}, r"schema at \$.type: 'bogus' is not valid"),
        ("json", {"properties": 3}, r"schema at \$.properties: 3 is not of type 'object'"),
        ("json", {"not": {}}, "Unimplemented keys"),
        ("json", {"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ("json", {"$ref": "#/nowhere"}, "does not exist"),
        ("json", {"$ref": "#"}, "no answer matches it$"),
        ("json", {"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ("json", {"type": "object", "minProperties": 2}, "minProperties = 2, expected no more than"),
        ("json", {"type": "number", "multipleOf": 0.1}, "multipleOf = 0.1, expected a whole number"),
        ("json", {"type": "string", "pattern": "("}, "unclosed group"),
        ("json", {"type": "string", "minLength": 10**6}, "no valid answer was found|no answer matches"),
        ("json", '{"items":' * 2000 + "{}" + "}" * 2000, "nested too deeply|not JSON"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", {"a": 1}, "a regex is dict, expected a string"),
        ("regex", "[a", "unclosed character class"),
        ("lark", "start: /a/", "found type 'lark', expected json or regex"),
    ],
)
def test_what_cannot_be_guided_is_refused_with_a_reason(vlm, kind, value, message):
    with pytest.raises(InputError, match=message) as caught:
        compiled(vlm, kind, value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and str(caught.value).startswith("grammar: ")
