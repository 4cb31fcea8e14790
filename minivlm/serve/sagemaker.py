"""POST /invocations, SageMaker's one route: the body says by its fields which of the other routes is meant."""

from typing import Any

from fastapi import APIRouter, Request, Response

from minivlm.serve.chat import chat_completions
from minivlm.serve.completions import completions
from minivlm.serve.limits import StrictRoute
from minivlm.serve.openai import ChatCompletion, ChatRequest, Completion, CompletionRequest
from minivlm.serve.tgi import EVENTS, CompatGenerateRequest, GenerateResponse, compat_generate
from minivlm.serve.wire import Admitted, Served, refusals

router = APIRouter(route_class=StrictRoute, tags=["SageMaker"])


@router.post("/invocations", responses={**refusals(), **EVENTS}, response_model_exclude_unset=True,
             response_model=list[GenerateResponse] | ChatCompletion | Completion)  # fmt: skip
async def invocations(
    request: Request,
    response: Response,
    asked: CompatGenerateRequest | ChatRequest | CompletionRequest,
    service: Served,
    record: Admitted,
) -> Any:
    """`inputs` is for `/`, `messages` for `/v1/chat/completions`, `prompt` for `/v1/completions`."""
    match asked:
        case CompatGenerateRequest():
            return await compat_generate(request, response, asked, service, record)
        case ChatRequest():
            return await chat_completions(request, response, asked, service, record)
    return await completions(request, response, asked, service, record)
