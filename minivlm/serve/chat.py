"""Chat: a dialogue with typed picture parts -> the model's own template -> answers, whole or as they come."""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from minivlm.processor.prompts import ANSWER_MARK, Message, normalise
from minivlm.serve import tools as calls
from minivlm.serve.errors import Refused
from minivlm.serve.limits import StrictRoute
from minivlm.serve.openai import (
    REASONS,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokens,
    Delta,
    FunctionCall,
    FunctionDelta,
    ImagePart,
    Likely,
    ToolCall,
    ToolCallDelta,
)
from minivlm.serve.service import Finished, Generation, Piece, Prompt, Service, unless_gone
from minivlm.serve.tgi import all_of, started, tokens_of
from minivlm.serve.wire import (
    Admitted,
    EventStream,
    Served,
    envelope,
    event,
    events_of,
    headers,
    merged,
    refusals,
    stream_headers,
    told,
    usage,
)

ROLES = {"developer": "system", "tool": "user", "function": "user"}  # roles that these models' templates lack
CHUNKS = events_of("ChatChunk")

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True,
             responses={**refusals(openai=True), **CHUNKS})  # fmt: skip
async def chat_completions(
    request: Request, response: Response, asked: ChatRequest, service: Served, record: Admitted
) -> Any:
    """Answers to a dialogue; with `stream`, an event a token and then `[DONE]`."""
    asked.check_rules(service.limits)
    parameters = asked.parameters()
    parameters.check(service.limits, stream=False)
    prompt = await service.work(prompt_of, service, asked)
    running = await unless_gone(request, started(service, prompt, parameters, record, asked.each))
    if asked.stream:
        events = told(service, record, _events(service, asked, running), openai=True)
        return EventStream(events, stream_headers(service, len(prompt.text)))
    finished = await unless_gone(request, all_of([generation.whole() for generation in running]))
    response.headers.update(headers(service, record, len(prompt.text), finished[0]))
    choices = [choice(service, asked, i, one) for i, one in enumerate(finished)]
    return ChatCompletion(**envelope(service, "chat.completion"), choices=choices, usage=usage(finished, asked.each))


@router.post("/chat_tokenize", responses=refusals())
async def chat_tokenize(request: Request, asked: ChatRequest, service: Served, record: Admitted) -> ChatTokens:
    """The text that a dialogue becomes, and its tokens."""
    prompt = await service.work(prompt_of, service, asked)
    tokens = await unless_gone(request, tokens_of(service, prompt))
    return ChatTokens(tokenize_response=tokens, templated_text=prompt.text)


# ---- the prompt


def prompt_of(service: Service, asked: ChatRequest) -> Prompt:
    """The dialogue through the model's chat template, its pictures where their parts stand. In a worker thread."""
    processor = service.pipeline.processor
    messages = normalise([message_of(message) for message in asked.messages])
    if tools := asked.offered:
        last = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=None)
        if last is None:
            raise Refused(422, "Tool error: `tools` without a message of the user", "tool_error")
        messages[last]["content"].append({"type": "text", "text": calls.told(tools, asked.tool_prompt)})
    if messages[-1]["role"] == "assistant":  # it is continued: what the template puts behind an answer is cut off
        answer = "".join(part["text"] for part in messages[-1]["content"])
        messages[-1] = {"role": "assistant", "content": ANSWER_MARK}
        text = processor.render(messages, add_generation_prompt=False).partition(ANSWER_MARK)[0] + answer
    else:
        text = processor.render(messages)
    parts = [part for one in asked.messages if isinstance(one.content, list) for part in one.content]
    return Prompt(text, tuple(part.image_url.url for part in parts if isinstance(part, ImagePart)))


def message_of(message: ChatMessage) -> Message:
    """A message as the processor takes it: parts stay parts, so that no template can lose a picture."""
    content: list[dict[str, str]] = []
    if isinstance(message.content, str):
        content.append({"type": "text", "text": message.content})
    for part in message.content if isinstance(message.content, list) else ():
        content.append({"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text})
    for call in message.tool_calls or ():
        content.append({"type": "text", "text": json.dumps({"name": call.function.name}, ensure_ascii=False)[:-1]
                        + f', "arguments": {call.function.arguments}}}'})  # fmt: skip
    role = ROLES.get(message.role, message.role)
    return {"role": role, "content": content or [{"type": "text", "text": ""}]}


# ---- the answer


def choice(service: Service, asked: ChatRequest, index: int, finished: Finished) -> ChatChoice:
    """One whole answer."""
    logprobs = ChatLogprobs(content=logprobs_of(service, finished.pieces)) if asked.logprobs else None
    message, reason = AssistantMessage(role="assistant", content=finished.text), REASONS[finished.finish_reason]
    if asked.offered:
        try:
            call = json.loads(finished.text)
        except ValueError:  # only a stop string can have cut it
            raise Refused(500, "Incomplete generation: a stop string ended the call", "incomplete_generation") from None
        if call["name"] == calls.NO_TOOL:
            message.content = call["arguments"]["content"]
        else:
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            function = FunctionCall(name=call["name"], arguments=arguments)
            call = ToolCall(id=call_id(), type="function", function=function)
            message = AssistantMessage(role="assistant", content=None, tool_calls=[call])
            reason = "tool_calls"
    return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason)


def call_id() -> str:
    """A new id of a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def logprobs_of(service: Service, pieces: Sequence[Piece]) -> list[ChatLogprob]:
    """The tokens in OpenAI's form, of the model's own distribution; the end-of-text token is one of them."""

    def likely(token_id: int, logprob: float, bare: bool) -> dict[str, Any]:
        text, data = service.spelled(token_id, bare)
        return {"token": text, "logprob": logprob, "bytes": data}

    return [
        ChatLogprob(
            **likely(piece.token.id, piece.token.logprob, piece.bare),
            top_logprobs=[Likely(**likely(one.id, one.logprob, piece.bare)) for one in piece.token.alternatives],
        )
        for piece in pieces
    ]


async def _events(service: Service, asked: ChatRequest, running: list[Generation]) -> AsyncIterator[bytes]:
    shared = envelope(service, "chat.completion.chunk")
    tools = [calls.Call() for _ in running] if asked.offered else []

    def chunk(*choices: ChatChunkChoice) -> bytes:
        return event(ChatChunk(**shared, choices=list(choices)))

    for i in range(len(running)):
        opening = Delta(role="assistant", content="")
        yield chunk(ChatChunkChoice(index=i, delta=opening, logprobs=None, finish_reason=None))
    async for i, piece in merged(running):
        logprobs = ChatLogprobs(content=logprobs_of(service, [piece])) if asked.logprobs else None
        finished = running[i].finished
        reason = None if finished is None else REASONS[finished.finish_reason]
        delta = Delta(content=piece.token.text)
        if tools:
            delta = call_delta(tools[i], piece.token.text, finished is not None)
            if finished is not None and tools[i].name not in (None, calls.NO_TOOL):
                reason = "tool_calls"
        yield chunk(ChatChunkChoice(index=i, delta=delta, logprobs=logprobs, finish_reason=reason))
    if asked.wants_usage:
        numbers = usage([generation.finished for generation in running], asked.each)
        yield event(ChatChunk(**shared, choices=[], usage=numbers))


def call_delta(call: calls.Call, text: str, last: bool) -> Delta:
    """What is new of a call. Words instead of a call are told when they are whole."""
    named = call.name is not None
    new = call.push(text, last)
    if call.name is None:
        return Delta()
    if call.name == calls.NO_TOOL:
        return Delta(content=call.content) if last else Delta()
    if named:
        return Delta(tool_calls=[ToolCallDelta(index=0, function=FunctionDelta(arguments=new))] if new else None)
    function = FunctionDelta(name=call.name, arguments=new)
    return Delta(tool_calls=[ToolCallDelta(index=0, id=call_id(), type="function", function=function)])
