"""Completions: prompts continued, in a stream whose chunks OpenAI's and Hugging Face's clients both read."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from minivlm.serve.limits import StrictRoute
from minivlm.serve.openai import (
    REASONS,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionRequest,
    CompletionUsage,
)
from minivlm.serve.parameters import Parameters
from minivlm.serve.service import Generation, Piece, Service, unless_gone
from minivlm.serve.tgi import all_of, batch_exceeded, prompt_of, started, stream_response
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

CHUNKS = events_of("CompletionChunk")
# @huggingface/inference puts `/v1/completions` behind whatever address it was given.
PATHS = ("/v1/completions", "/generate_stream/v1/completions", "/generate/v1/completions")

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


async def completions(
    request: Request, response: Response, asked: CompletionRequest, service: Served, record: Admitted
) -> Any:
    """Completions of one prompt or several; with `stream`, an event a token and then `[DONE]`."""
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    if not 1 <= len(prompts) <= service.limits.max_client_batch_size:
        raise batch_exceeded(service)
    asked.check_rules(service.limits)
    parameters = asked.parameters()
    parameters.check(service.limits, stream=bool(asked.stream and parameters.decoder_input_details))
    each = [started(service, prompt_of(prompt), parameters, record, asked.each) for prompt in prompts]
    running = [one for group in await unless_gone(request, all_of(each)) for one in group]
    echoes = [prompt if parameters.return_full_text else "" for prompt in prompts for _ in range(asked.each)]
    characters = sum(map(len, prompts))
    if asked.stream:
        events = _events(service, asked, parameters, running, echoes)
        return EventStream(told(service, record, events, openai=True), stream_headers(service, characters))
    finished = await unless_gone(request, all_of([generation.whole() for generation in running]))
    response.headers.update(headers(service, record, characters, finished[0]))
    choices = [
        CompletionChoice(index=i, text=echo + one.text, finish_reason=REASONS[one.finish_reason],
                         logprobs=logprobs_of(service, asked, one.pieces, len(echo)))
        for i, (one, echo) in enumerate(zip(finished, echoes, strict=True))
    ]  # fmt: skip
    return Completion(**envelope(service, "text_completion"), choices=choices, usage=usage(finished, asked.each))


for path in PATHS:
    router.add_api_route(
        path,
        completions,
        methods=["POST"],
        name=path,
        response_model=Completion,
        response_model_exclude_unset=True,
        responses={**refusals(openai=True), **CHUNKS},
    )


async def _events(
    service: Service, asked: CompletionRequest, parameters: Parameters, running: list[Generation], echoes: list[str]
) -> AsyncIterator[bytes]:
    shared = envelope(service, "text_completion")
    offsets = [0] * len(running)
    async for i, piece in merged(running):
        finished = running[i].finished
        reason = "" if finished is None else REASONS[finished.finish_reason]
        text = (echoes[i] if piece.index == 1 else "") + piece.token.text
        logprobs = logprobs_of(service, asked, [piece], offsets[i])
        offsets[i] += len(text)
        choice = CompletionChoice(index=i, text=text, logprobs=logprobs, finish_reason=reason)
        tgi = stream_response(service, running[i], piece, echoes[i], parameters)
        yield event(CompletionChunk(**shared, choices=[choice], **dict(tgi)))
    if asked.wants_usage:
        numbers = usage([generation.finished for generation in running], asked.each)
        yield event(CompletionUsage(**shared, choices=[], usage=numbers))


def logprobs_of(
    service: Service, asked: CompletionRequest, pieces: Sequence[Piece], offset: int
) -> CompletionLogprobs | None:
    """The tokens in OpenAI's older form, if they were asked for; the end-of-text token is one of them."""
    if asked.logprobs is None:
        return None
    return CompletionLogprobs(
        tokens=[service.spelled(piece.token.id, piece.bare)[0] for piece in pieces],
        token_logprobs=[piece.token.logprob for piece in pieces],
        top_logprobs=[
            {service.spelled(one.id, piece.bare)[0]: one.logprob for one in piece.token.alternatives}
            for piece in pieces
        ],
        text_offset=[offset + sum(len(one.text) for one in pieces[:i]) for i in range(len(pieces))],
    )
