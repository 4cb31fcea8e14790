"""POST /, where huggingface_hub sends prompts and its picture tasks: a picture is described, a question answered."""

import math
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Discriminator, Tag
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from minivlm.processor.prompts import normalise
from minivlm.serve.errors import Refused, invalid
from minivlm.serve.limits import StrictRoute
from minivlm.serve.parameters import Parameters, Schema
from minivlm.serve.service import Finished, Prompt, Record, Service, unless_gone
from minivlm.serve.tgi import EVENTS, CompatGenerateRequest, GenerateResponse, compat_generate, started
from minivlm.serve.wire import Admitted, Served, headers, refusals

DESCRIBE = "Describe the picture."  # what is asked where a task has no question

router = APIRouter(tags=["Hugging Face"])


class Pictured(Schema):
    """A question about a picture in base64."""

    question: str
    image: str


class QuestionRequest(Schema):
    """What `visual_question_answering` and `document_question_answering` send; `parameters` make no difference.

    inputs: both, or the picture with `question` beside it.
    """

    inputs: Pictured | str
    question: str | None = None

    @property
    def pictured(self) -> Pictured:
        """The question and its picture."""
        if isinstance(self.inputs, Pictured):
            return self.inputs
        if self.question is None:
            raise invalid("`question` is null, expected a string")
        return Pictured(question=self.question, image=self.inputs)


class AnswerOut(Schema):
    """The answer and its probability; it has no place in a text, so `start` and `end` are absent."""

    answer: str
    score: float


def kind_of(body: Any) -> str:
    """Which of the requests a body is meant to be; messages leave names in brackets out."""
    asks = isinstance(body, dict) and ("question" in body or isinstance(body.get("inputs"), dict))
    return "[question]" if asks else "[prompt]"


Asked = Annotated[
    Annotated[QuestionRequest, Tag("[question]")] | Annotated[CompatGenerateRequest, Tag("[prompt]")],
    Discriminator(kind_of),
]


class PictureRoute(StrictRoute):
    """Takes the requests whose body is a picture's file: so says the content type, or there is none."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As every route, for these requests."""
        kind = Headers(scope=scope).get("content-type", "image/*")
        if kind.startswith(("image/", "application/octet-stream")):
            return super().matches(scope)
        return Match.NONE, {}


async def describe(request: Request, response: Response, service: Served, record: Admitted) -> list[GenerateResponse]:
    """What `image_to_text` sends: the file of a picture, nothing else."""
    file = await request.body()
    if "content-type" not in request.headers and file.lstrip()[:1] in (b"{", b""):
        raise Refused(415, "Expected request with `Content-Type: application/json`, or a picture")
    if len(file) > service.limits.max_image_bytes:
        raise invalid(f"picture: {len(file)} bytes, expected at most {service.limits.max_image_bytes}")
    finished = await unless_gone(request, answered(service, DESCRIBE, file, record))
    response.headers.update(headers(service, record, len(DESCRIBE), finished))
    return [GenerateResponse(generated_text=finished.text)]


async def root(
    request: Request, response: Response, asked: Annotated[Asked, Body()], service: Served, record: Admitted
) -> Any:
    """What huggingface_hub calls: `/generate` in a list, `/generate_stream` if `stream` is true, or a question."""
    if isinstance(asked, CompatGenerateRequest):
        return await compat_generate(request, response, asked, service, record)
    pictured = asked.pictured
    image = pictured.image if ":" in pictured.image[:8] else f"data:;base64,{pictured.image}"
    finished = await unless_gone(request, answered(service, pictured.question, image, record))
    response.headers.update(headers(service, record, len(pictured.question), finished))
    score = math.exp(sum(piece.token.logprob for piece in finished.pieces))
    return [AnswerOut(answer=finished.text, score=min(1.0, score))]


PICTURE_BODY = {"requestBody": {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}
OPTIONS: dict[str, Any] = {"methods": ["POST"], "response_model_exclude_unset": True}
router.add_api_route("/", describe, **OPTIONS, include_in_schema=False, route_class_override=PictureRoute)
router.add_api_route("/", root, **OPTIONS, responses={**refusals(), **EVENTS}, route_class_override=StrictRoute,
                     response_model=list[GenerateResponse] | list[AnswerOut], openapi_extra=PICTURE_BODY)  # fmt: skip


async def answered(service: Service, question: str, image: str | bytes, record: Record) -> Finished:
    """The greedy answer to a question about a picture, in the words of the model's chat template."""
    prompt = await service.work(prompt_of, service, question, image)
    (generation,) = await started(service, prompt, Parameters(), record)
    return await generation.whole()


def prompt_of(service: Service, question: str, image: str | bytes) -> Prompt:
    """The dialogue of one question. In a worker thread."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return Prompt(service.pipeline.processor.render(normalise([{"role": "user", "content": parts}])), (image,))
