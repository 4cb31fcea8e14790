"""Guided generation: a JSON schema or a regex decides, id by id, what may come next, and the answer always ends valid.

llguidance matches; what is ours is the end. A guide always knows a *closing path*: bytes that lead from where the
answer is to an accepted end, and that fit in the tokens left. A sampled id is taken only if such a path is found from
behind it; otherwise the path's own next token is the only one allowed. So an answer that could begin ends valid within
max_new_tokens, whatever the weights.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processor.tokens import Tokenizer
from minivlm.row import Vocabulary

# Bytes in the order in which they are likely to lead to an end.
ENDINGS = b'\n}],:")@./ ' + b"0123456789" + b"-_aAeEoOtTnNsSrRiIlLdDuUcCmMpPfFgGhHbByYwWkKvVxXjJqQzZ"
UTF8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # bytes that texts have
BYTES = [bytes([byte]) for byte in (*ENDINGS, *(byte for byte in UTF8 if byte not in ENDINGS))]
# No blanks but these, as json.dumps writes: a model that likes blanks would fill its answer with them.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
        raise InputError(f"grammar: no answer matches it ({_line(matcher.get_error())})")
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
        Draft202012Validator.check_schema(value)
        # An object without a word on further properties has none: any other key would be valid, and never meant. Where
        # schemas are added up by allOf, closing each would exclude the others' properties.
        return _closed(value, close="allOf" not in json.dumps(value))
    except SchemaError as error:
        raise InputError(f"grammar: schema at {error.json_path}: {_line(error.message)}") from None
    except RecursionError:
        raise InputError("grammar: the schema is nested too deeply") from None


def _closed(value: Any, close: bool, names: bool = False) -> Any:
    """A schema with what its writers take for granted: where properties are named, an object is meant, of those only.

    names: whether the keys of this object are properties' names, not keywords.
    """
    if isinstance(value, list):
        return [_closed(item, close) for item in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, item in value.items():
        literal = not names and key in ("const", "enum", "default", "examples", "required", "x-guidance")
        inside = not names and key in ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
        out[key] = item if literal else _closed(item, close, inside)
    if not names and value.get("minProperties", 0) > len(value.get("required", ())):
        least = value["minProperties"]
        raise InputError(f"grammar: minProperties = {least}, expected no more than the required ones: keys may repeat")
    if not names and "properties" in value:
        if not value.keys() & {"type", "anyOf", "oneOf", "$ref"}:
            out["type"] = "object"
        if close and not value.keys() & {"anyOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties"}:
            out.setdefault("additionalProperties", False)
    return out


@dataclass(frozen=True)
class Words:
    """The vocabulary as bytes.

    ids: of those that may be generated, one for each text; special tokens are no text. longest: of the texts.
    """

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
        known = [self._path[same:], self._path] if same else [self._path]
        search = Search(self._words, known)
        path = search.best_first(self._matcher, 100, 40)
        return search.rotating(self._matcher, 200) if path is None else path

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
    comes to options that it saw before. Where a path that was known before is valid again, either is over.
    """

    def __init__(self, words: Words, known: Sequence[bytes] = ()):
        self.words, eos = words, min(words.eos_ids)
        self.known = [(tail, [*words.one_by_one(tail), eos]) for tail in known]

    def best_first(self, matcher: LLMatcher, states: int, depth: int, letters: bytes | None = None) -> bytes | None:
        """letters: only these are tried where there is a choice, the shortest texts first."""
        order = count()
        heap = [(0, 0, next(order), matcher, b"", b"")]
        while heap and states > 0:
            cost, steps, _, state, text, more = heappop(heap)
            while states > 0 and (state := self.after(state, more)) is not None:
                states, text = states - 1, text + more
                if (tail := self.tail(state)) is not None:
                    return text + tail
                options = self.options(state)
                if letters is not None and len(options) > 1:
                    options = [option for option in options if option in letters]
                if steps == depth or not options:
                    break
                steps += 1
                for rank, option in enumerate(options[1:], start=1):
                    key = cost + rank if letters is None else len(text) + 1
                    heappush(heap, (key, steps, next(order), state, text, option))
                more = options[0]
                if letters is not None:
                    heappush(heap, (len(text) + 1, steps, next(order), state, text, more))
                    break
        return None

    def rotating(self, matcher: LLMatcher, states: int) -> bytes | None:
        """One way on and on."""
        state, text, visits = matcher.deep_copy(), b"", Counter()
        for _ in range(states):
            if (tail := self.tail(state)) is not None:
                return text + tail
            options = self.options(state)
            place = b"".join(options)
            if not options:
                return None
            more = options[visits[place] % len(options)]
            visits[place] += 1
            text += more
            if state.try_consume_tokens(self.words.one_by_one(more)) < len(more):
                return None
        return None

    def shortened(self, matcher: LLMatcher, path: bytes) -> bytes:
        """A path without what it can do without."""
        eos = min(self.words.eos_ids)
        for size in (32, 16, 8, 4, 2, 1):
            at = 0
            while at < len(path):
                less = path[:at] + path[at + size :]
                ids = [*self.words.one_by_one(less), eos]
                if matcher.validate_tokens(ids) == len(ids):
                    path = less
                else:
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
            found.remove(b'"')
            found.insert(0, b'"')
        return found


def _first_path(matcher: LLMatcher, words: Words, letters: bytes | None) -> bytes | None:
    """A path from the beginning. letters: of a regex, whose end may look like its middle."""
    search = Search(words)
    path = search.best_first(matcher, 400, 40)
    if path is None and letters is not None:
        path = search.best_first(matcher, 2000, 12, letters)
    if path is None and (path := search.rotating(matcher, 4000)) is not None and len(path) < 1000:
        path = search.shortened(matcher, path)
    return path
