"""Guided generation: a JSON schema or a regex decides, id by id, what may come next, and the answer always ends valid.

llguidance matches; what is ours is the end. A guide always knows a *closing path*: bytes that lead from where the
answer is to an accepted end, and that fit in the tokens left. A sampled id is taken only if such a path is found from
behind it; otherwise the path's own next token is the only one allowed. So an answer that could begin ends valid within
max_new_tokens, whatever the weights.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from jsonschema import Draft202012Validator, FormatChecker, SchemaError
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processor.tokens import Tokenizer
from minivlm.row import Vocabulary

# Bytes in the order in which they are likely to lead to an end. 0 is last of the digits: Python knows no year 0000.
ENDINGS = b'\n}],:")@./ ' + b"1234567890" + b"-_aAeEoOtTnNsSrRiIlLdDuUcCmMpPfFgGhHbByYwWkKvVxXjJqQzZ"
UTF8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # bytes that texts have
BYTES = [bytes([byte]) for byte in (*ENDINGS, *(byte for byte in UTF8 if byte not in ENDINGS))]
# No blanks but these, as json.dumps writes: a model that likes blanks would fill its answer with them.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# No \uXXXX: with it a key could be spelled in two ways, and so repeat one that was declared otherwise.
STYLE |= {"json_allowed_escapes": 'nrbtf\\"'}
LITERAL = ("const", "enum", "default", "examples", "required", "x-guidance")  # keywords whose values hold no schemas
NAMING = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")  # schemas by names
OPEN = {"anyOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties"}  # keywords that may add properties
CHOICES = 40  # in a row: a number, a date or a UUID ends within them, a way with more is likely to go in circles
STATES = 400  # tried for a value, or a small schema as a whole: about 0.1 s; ten times as many where one way goes on
LETTERS = 2000  # states tried for a regex by its letters: the shortest texts are found, in about half a second
NEXT = 100  # states tried behind a sampled id: other answers wait meanwhile
LONGEST = 30_000  # bytes of a first path: hundreds of properties; longer answers than any model's context
CUTTING = 3_000_000  # bytes given to the matcher to shorten a path: about a second


def compile_grammar(
    kind: Literal["json", "regex"], value: dict | str, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> "Grammar":
    """A grammar that guides answers. value: a JSON schema, also as text; or a regex in Rust's syntax, for the whole
    answer. Raises InputError for one that is wrong, not supported, or whose shortest answer was not found.
    """
    words = _words(tokenizer, vocabulary)
    if kind == "json":
        source = LLMatcher.grammar_from_json_schema(json.dumps(_schema(value)), overrides=STYLE)
    elif kind == "regex":
        if not isinstance(value, str):
            raise InputError(f"grammar: a regex is {type(value).__name__}, expected a string")
        source = LLMatcher.grammar_from_regex(value)
    else:
        raise InputError(f"grammar: found type {kind!r}, expected json or regex")
    if error := LLMatcher.validate_grammar(source, words.backend):
        raise InputError(f"grammar: {_line(error)}")
    matcher = LLMatcher(words.backend, source, log_level=0)
    path = _first_path(matcher, words, value.encode() if kind == "regex" else None)
    if matcher.is_error():
        error = matcher.get_error()  # NoExtensionBias, which says nothing to others, is a start that nothing may follow
        raise InputError("grammar: no answer matches it" + (f" ({_line(error)})" * ("NoExtensionBias" not in error)))
    if path is None:
        raise InputError("grammar: no valid answer was found, expected a simpler one")
    return Grammar(words, matcher, path)


def _line(message: str) -> str:
    """A library's message on one line, without its dump of the matcher."""
    return " ".join(message.split("<state>")[0].split())[:300]


def _schema(value: dict | str) -> dict:
    """The schema as llguidance should read it. Raises InputError for what is no schema."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"grammar: the schema is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"grammar: the schema is {type(value).__name__}, expected an object")
    try:
        Draft202012Validator.check_schema(value, format_checker=FormatChecker(formats=()))  # patterns are Rust's
        return _closed(value)
    except SchemaError as error:
        raise InputError(f"grammar: schema at {error.json_path}: {_line(error.message)}") from None
    except RecursionError:
        raise InputError("grammar: the schema is nested too deeply") from None


def _schemas(value: Any, names: bool = False) -> Iterator[dict]:
    """A schema and all in it. names: whether the keys of this object are properties' names, not keywords."""
    if isinstance(value, list):
        for item in value:
            yield from _schemas(item)
    elif isinstance(value, dict):
        if not names:
            yield value
        for key, item in value.items():
            if names or key not in LITERAL:
                yield from _schemas(item, not names and key in NAMING)


def _closed(value: dict) -> dict:
    """A schema with what its writers take for granted: where properties are named, an object is meant, of those only.

    Any other key would be valid, and never meant. Where schemas are added up by allOf, closing each would exclude the
    others' properties; where one without a name is required, others are meant.
    """
    value = deepcopy(value)
    close = not any("allOf" in schema for schema in _schemas(value))
    for schema in _schemas(value):
        required, named = schema.get("required", ()), schema.get("properties")
        if (least := schema.get("minProperties", 0)) > len(required):
            raise InputError(f"grammar: minProperties = {least}, expected no more than the required: keys may repeat")
        if (step := schema.get("multipleOf", 1)) != int(step):
            raise InputError(f"grammar: multipleOf = {step}, expected a whole number: floats have no exact multiples")
        if named is not None and not schema.keys() & {"type", "anyOf", "oneOf", "$ref"}:
            schema["type"] = "object"
        if close and named is not None and named.keys() >= set(required) and not schema.keys() & OPEN:
            schema.setdefault("additionalProperties", False)
    return value


@dataclass(frozen=True)
class Words:
    """The vocabulary as bytes. ids: of what may be generated, one for each text. longest: of the texts."""

    backend: LLTokenizer
    eos_ids: frozenset[int]
    size: int
    ids: Mapping[bytes, int]
    longest: int

    def spell(self, text: bytes) -> list[int]:
        """The fewest ids that make a text."""
        best: list[tuple[int, int]] = [(0, 0)]  # of each beginning: the number of ids, the length of the last
        for end in range(1, len(text) + 1):
            lengths = range(1, min(self.longest, end) + 1)
            best.append(min((best[end - n][0] + 1, n) for n in lengths if text[end - n : end] in self.ids))
        ids, end = [], len(text)
        while end:
            n = best[end][1]
            ids.append(self.ids[text[end - n : end]])
            end -= n
        return ids[::-1]

    def one_by_one(self, text: bytes) -> list[int]:
        """An id for each byte, which is quicker to find."""
        return [self.ids[text[at : at + 1]] for at in range(len(text))]


@lru_cache(maxsize=4)
def _words(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Words:
    ends = sorted(vocabulary.eos_ids)
    if not ends:
        raise InputError("grammar: the model has no end-of-text token, expected one")
    backend = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary.size, eos_token=ends)
    ids: dict[bytes, int] = {}
    plain = [i for i in vocabulary.allowed.nonzero().flatten().tolist() if not backend.is_special_token(i)]
    for token_id in sorted(plain, key=lambda i: i not in tokenizer.byte_ids):  # a byte's own token has the last say
        if text := backend.decode_bytes([token_id]):
            ids[text] = token_id
    if missing := [byte for byte in UTF8 if bytes([byte]) not in ids]:
        raise InputError(f"grammar: the vocabulary has no token for the bytes {missing}, expected one for each")
    return Words(backend, vocabulary.eos_ids, vocabulary.size, ids, max(map(len, ids)))


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar, for any number of answers."""

    words: Words = field(repr=False)
    matcher: LLMatcher = field(repr=False)
    path: bytes

    @property
    def minimum(self) -> int:
        """Tokens of the shortest valid answer that was found; at least 1."""
        return max(1, len(self.words.spell(self.path)))

    def guide(self) -> "GrammarGuide":
        """What leads one answer through the grammar."""
        return GrammarGuide(self)


class GrammarGuide:
    """Leads one answer: says which ids may come, and takes only those from which its end is within reach."""

    def __init__(self, grammar: Grammar):
        self._words, self._matcher, self._path = grammar.words, grammar.matcher.deep_copy(), grammar.path
        self._forced: int | None = None  # the only id allowed next
        self._blind = False  # the matcher gave up; what is left is the path

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return not self._path if self._blind else self._matcher.is_stopped()

    def bitmask(self) -> Tensor:
        """int32 [ceil(V / 32)]: the ids that may come next."""
        mask = np.zeros(-(-self._words.size // 32), dtype=np.int32)
        if self._forced is None and not self._blind:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self._blind = self._matcher.is_error()
        if self._blind and self._forced is None:
            self._force()
        if self._forced is not None:
            mask[:] = 0
            mask.view(np.uint32)[self._forced // 32] = 1 << self._forced % 32
        return torch.from_numpy(mask)

    def accept(self, token_id: int, left: int) -> bool:
        """Take an id, with `left` more to come at most, if the answer can end valid behind it."""
        if token_id == self._forced or self._blind:
            return self._follow(token_id)
        if token_id in self._words.eos_ids:
            return self._matcher.is_accepting()
        if self._matcher.validate_tokens([token_id]) == 1 and self._matcher.consume_token(token_id):
            path = self._path_behind(self._words.backend.decode_bytes([token_id]))
            if path is not None and (len(path) <= left or len(self._words.spell(path)) <= left):
                self._path = path
                return True
            self._blind = not self._matcher.rollback(1)
        self._blind |= self._matcher.is_error()
        self._force()
        return False

    def _path_behind(self, text: bytes) -> bytes | None:
        """A path from the matcher's present state, just behind `text`, or None where none was found."""
        same = next((i for i, (a, b) in enumerate(zip(text, self._path, strict=False)) if a != b), len(self._path))
        same = min(same, len(text))
        # What was said in place of the path's own words; what was said before them; or something to be closed first.
        known = dict.fromkeys((self._path[len(text) :], self._path[same:], self._path))
        search = Search(self._words, tuple(known))
        path = search.best_first(self._matcher, NEXT)
        return search.by_stages(self._matcher, NEXT, 20 * NEXT) if path is None else path

    def _force(self) -> None:
        ids = self._words.spell(self._path)
        self._forced = ids[0] if ids else min(self._words.eos_ids)

    def _follow(self, token_id: int) -> bool:
        """Take the path's own next id."""
        if token_id != self._forced:
            return False
        self._forced = None
        if token_id in self._words.eos_ids:
            return True
        self._path = self._path[len(self._words.backend.decode_bytes([token_id])) :]
        self._blind |= not self._matcher.consume_token(token_id)
        return True


class Search:
    """Looks for bytes that lead from a matcher's state to an accepted end.

    No state is a dead end, so whoever keeps taking what is likely to end arrives, unless it goes in circles.
    `best_first` departs from the likeliest way where that costs least; `rotating` takes another option whenever it
    comes to options that it saw before; `by_stages` goes on from value to value by them. Where a path that was known
    before is valid again, each is over. `shortest_first` is for regexes, whose end may look like their middle.
    """

    def __init__(self, words: Words, known: Sequence[bytes] = ()):
        self.words, eos = words, min(words.eos_ids)
        self.known = [(tail, [*words.one_by_one(tail), eos]) for tail in known]

    def best_first(self, matcher: LLMatcher, states: int, stage: bool = False) -> bytes | None:
        """stage: only as far as bytes that must come."""
        order = count()
        heap = [(0, 0, next(order), matcher, b"", b"")]
        while heap and states > 0:
            cost, choices, _, state, text, more = heappop(heap)
            while states > 0 and (state := self.after(state, more)) is not None:
                states, text = states - 1, text + more
                if (tail := self.tail(state)) is not None:
                    return text + tail
                options = self.options(state)
                if stage and len(options) == 1:
                    return text + options[0]
                if choices == CHOICES or not options:
                    break
                choices += 1
                for rank, option in enumerate(options[1:], start=1):
                    heappush(heap, (cost + rank, choices, next(order), state, text, option))
                more = options[0]
        return None

    def shortest_first(self, matcher: LLMatcher, letters: bytes) -> bytes | None:
        """letters: only these are tried where there is a choice."""
        order = count()
        heap = [(0, next(order), matcher, b"", b"")]
        states = LETTERS
        while heap and (states := states - 1):
            _, _, before, text, more = heappop(heap)
            if (state := self.after(before, more)) is not None and state.is_accepting():
                return text + more
            text, options = text + more, self.options(state) if state else []
            for option in options if len(options) == 1 else [option for option in options if option in letters]:
                heappush(heap, (len(text) + len(option), next(order), state, text, option))
        return None

    def rotating(self, matcher: LLMatcher, states: int, stage: bool = False) -> bytes | None:
        """One way on and on. stage: only as far as bytes that must come."""
        state, text, visits = matcher.deep_copy(), b"", Counter()
        for _ in range(states):
            if (tail := self.tail(state)) is not None:
                return text + tail
            if not (options := self.options(state)):
                return None
            place = b"".join(options)
            more = options[visits[place] % len(options)]
            visits[place] += 1
            text += more
            if stage and len(options) == 1:
                return text
            if state.try_consume_tokens(self.words.one_by_one(more)) < len(more):
                return None
        return None

    def by_stages(self, matcher: LLMatcher, states: int, longest: int) -> bytes | None:
        """From bytes that must come to the next such, for good: what is sought is never more than a value's end."""
        state, text = matcher, b""
        while state is not None and len(text) < longest:
            if (tail := self.tail(state)) is not None:
                return text + tail
            more = self.best_first(state, states, stage=True) or self.rotating(state, 10 * states, stage=True)
            if more is None:
                return None
            state, text = self.after(state, more), text + more
        return None

    def shortened(self, matcher: LLMatcher, path: bytes) -> bytes:
        """A path without what it can do without: from front to end, the most elements first, then the most bytes."""
        state, eos, work, at = matcher.deep_copy(), min(self.words.eos_ids), CUTTING, 0
        ids = [*self.words.one_by_one(path), eos]
        marks = [
            i for i in range(1, len(path)) if path[i] in b",}]" or path[i - 1] in b"{[" or path[i - 2 : i] == b", "
        ]
        while at < len(path) and work > 0:
            near = bisect_left(marks, at)
            hops = (512, 256, 128, 64, 32, 16, *range(8, 0, -1)) if marks[near : near + 1] == [at] else ()
            ends = [marks[near + hop] for hop in hops if near + hop < len(marks)]
            for end in (*ends, *(at + size for size in (32, 16, 8, 4, 2, 1) if at + size <= len(path))):
                work -= 8
                if state.validate_tokens(ids[end : end + 8]) == len(ids[end : end + 8]):
                    work -= len(ids) - end
                    if state.validate_tokens(ids[end:]) == len(ids) - end:
                        path, ids = path[:at] + path[end:], ids[:at] + ids[end:]
                        marks = [*marks[:near], *(i - end + at for i in marks[near:] if i >= end)]
                        break
            else:
                state.consume_token(ids[at])
                at += 1
        return path

    def tail(self, state: LLMatcher) -> bytes | None:
        """What is known to lead from here to an end; nothing, where this is one."""
        if state.is_accepting():
            return b""
        return next((tail for tail, ids in self.known if state.validate_tokens(ids) == len(ids)), None)

    def after(self, matcher: LLMatcher, text: bytes) -> LLMatcher | None:
        """A matcher further on by these bytes."""
        if not text:
            return matcher
        state, ids = matcher.deep_copy(), self.words.one_by_one(text)
        return state if state.try_consume_tokens(ids) == len(ids) else None

    def options(self, matcher: LLMatcher) -> list[bytes]:
        """What may follow, the likeliest to lead to an end first: all bytes that must, else each byte that may."""
        if forced := matcher.compute_ff_bytes():
            return [forced]  # the mask has only the ids by which the tokenizer itself would spell these
        mask = np.zeros(-(-self.words.size // 32), dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        found = [byte for byte in BYTES if bits[self.words.ids[byte]]]
        if b'"' in found and not {b",", b" ", b"a"}.isdisjoint(found):  # inside a string
            found.sort(key=lambda byte: byte != b'"')
        return found


def _first_path(matcher: LLMatcher, words: Words, letters: bytes | None) -> bytes | None:
    """A path from the beginning. letters: of a regex."""
    search = Search(words)
    path = search.best_first(matcher, STATES)
    if path is None and letters is not None:
        path = search.shortest_first(matcher, letters)
    if path is None:
        path = search.by_stages(matcher, STATES, LONGEST)
    return None if path is None else search.shortened(matcher, path)
