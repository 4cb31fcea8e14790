"""Tools: functions that the model may call, as a grammar for its answer and a text that tells it of them.

The answer is `{"name": "...", "arguments": {...}}`, so it can always be taken apart, also while it arrives.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from minivlm.serve.errors import Refused
from minivlm.serve.parameters import Schema

NO_TOOL = "no_tool"  # the function by which the model answers in words
TALK = {"type": "object", "properties": {"content": {"type": "string"}}, "required": ["content"],
        "additionalProperties": False}  # fmt: skip
TOOL_PROMPT = "Answer with the JSON of one call: the name of a function and its arguments. These are the functions:"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*', re.DOTALL)


class Function(Schema):
    """A function: its name, what it does, and the JSON schema of its arguments."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    """The name of a function."""

    name: str


class Choice(Schema):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


def offered(tools: Sequence[Tool], choice: str | Choice | None) -> list[Tool]:
    """The tools that the answer may call; none if there are none or the choice is "none"."""
    if not tools or choice == "none":
        return []
    if choice in (None, "auto", "required"):
        return list(tools)
    name = choice if isinstance(choice, str) else choice.function.name
    named = [tool for tool in tools if tool.function.name == name]
    if not named:
        raise Refused(422, f"Tool error: no tool is named {name!r}", "tool_error")
    return named


def schema_of(tools: Sequence[Tool], may_talk: bool) -> dict[str, Any]:
    """The schema of an answer that calls one of the tools or, if it may, speaks."""
    functions = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools}
    if may_talk:
        functions[NO_TOOL] = TALK
    # Each schema becomes a definition of its own, and what it refers to is then inside of that.
    definitions = {f"f{i}": moved(schema, f"#/$defs/f{i}") for i, schema in enumerate(functions.values())}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/f{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, name in enumerate(functions)
    ]
    return {"anyOf": calls, "$defs": definitions}


def moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it is put."""
    if isinstance(schema, list):
        return [moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        inner["$ref"] = place + reference[1:]
    return inner


def told(tools: Sequence[Tool], prompt: str | None) -> str:
    """The text that tells the model of its tools."""
    functions = [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]
    return f"\n{prompt or TOOL_PROMPT}\n{json.dumps(functions, ensure_ascii=False)}"


class Call:
    """An answer in the form of a call, taken apart as it arrives."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._text, self._sent = "", 0

    def push(self, text: str, last: bool) -> str:
        """What is new of the arguments' JSON. The brace that closes the call itself is never passed on."""
        self._text += text
        if self.name is None:
            head = HEAD.match(self._text)
            if head is None:
                return ""
            self.name, self._text = json.loads(f'"{head[1]}"'), self._text[head.end() :]
        # What may be the end of the call is held back: blanks and closing braces.
        end = len(self._text.rstrip().removesuffix("}").rstrip()) if last else len(self._text.rstrip("} \t\r\n"))
        new, self._sent = self._text[self._sent : end], max(self._sent, end)
        return new

    @property
    def content(self) -> str:
        """The words of a whole call of NO_TOOL."""
        return json.loads(self._text[: self._sent])["content"]
