"""The FastAPI application: routes and middleware put together, health, metrics, keys, and how errors are told."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from minivlm import __version__
from minivlm.serve import chat, completions, sagemaker, tasks, tgi
from minivlm.serve.errors import TOLD, ClientGone, Refused, internal, refused, unhealthy
from minivlm.serve.limits import BodyLimit
from minivlm.serve.log import GONE, AccessLog, Log
from minivlm.serve.openai import ChatChunk, CompletionChunk, Model, Models
from minivlm.serve.service import Service
from minivlm.serve.wire import ErrorResponse, Served, service_of

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

router = APIRouter()


class Info(BaseModel):
    """What is served, and its limits, in TGI's words."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


def create_app(
    service: Service, log: Log, api_key: str | None = None, origins: Sequence[str] = ("*",), grace: float = 30.0
) -> FastAPI:
    """The application. origins: of web pages that may ask. grace: seconds that answers have when it is stopped."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            await asyncio.gather(service.warm(), service.work(app.openapi))
        except (*TOLD, Refused) as error:  # limits that allow no picture; or each request will be told
            log.say(f"not warmed: {error}")
        yield
        await service.engine.close(grace)
        service.close()

    # A key is asked for by the middleware below, before a body is read; the dependency is for the document.
    secured = [] if api_key is None else [Depends(HTTPBearer(auto_error=False))]
    app = FastAPIOffline(  # its /docs loads nothing from elsewhere
        title="minivlm",
        version=__version__,
        description="A vision-language model behind the routes of text-generation-inference and OpenAI.",
        lifespan=lifespan,
        openapi_url="/api-doc/openapi.json",
        redoc_url=None,
        static_url="/docs/assets",
    )
    app.state.service = service
    app.openapi = partial(_document, app.openapi)
    for part in (tgi.router, tasks.router, chat.router, completions.router, sagemaker.router):
        app.include_router(part, dependencies=secured)
    app.include_router(router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    # The last to be added is the first to be met.
    app.add_middleware(BodyLimit, limits=service.limits)
    if api_key is not None:
        app.add_middleware(KeyCheck, key=api_key)
    # TGI allows browsers no header but content-type, and so no key and none of the openai client's own.
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(AccessLog, log=log)
    return app


def _document(made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's document with the models of events, which no route returns as a value."""
    document = made()  # FastAPI keeps what it made, so that this adds to one and the same document
    events = [(model, "serialization") for model in (tgi.StreamResponse, ChatChunk, CompletionChunk)]
    _, definitions = models_json_schema(events, ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] = definitions["$defs"] | document["components"]["schemas"]
    return document


class KeyCheck:
    """ASGI middleware: whatever is not merely read needs the key; without it, 401 and an empty body, as TGI."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            # In constant time: how long it takes must not tell how much of a guess was right.
            if not hmac.compare_digest(given, self.expected):
                return await Response(status_code=401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)
        await self.app(scope, receive, send)


# ---- routes that ask nothing of the model

HEALTH: dict[str, Any] = {"status_code": 200, "response_class": Response,
                          "responses": {503: {"model": ErrorResponse, "description": "Not ready"}}}  # fmt: skip


# HEAD, by which load balancers ask, is left out of the document: it would be each GET once more.
@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.get("/health", **HEALTH)
@router.get("/ping", **HEALTH)
async def health(service: Served) -> Response:
    """200 while the model can answer."""
    if not service.engine.state().alive:
        raise unhealthy()
    return Response()


@router.head("/", include_in_schema=False)
@router.get("/", **HEALTH)
async def root(service: Served, accept: Annotated[str, Header()] = "*/*") -> Response:
    """The page to try it for a browser; for others the health answer."""
    if "text/html" in accept:
        return HTMLResponse(PAGE.read_bytes(), headers=PAGE_HEADERS)
    return await health(service)


@router.get("/info")
async def info(service: Served) -> Info:
    """What is served, and its limits."""
    known = {name: value for name, value in vars(service.limits).items() if name in Info.model_fields}
    return Info(
        model_id=service.name,
        model_sha=None,
        model_pipeline_tag="image-text-to-text",
        router="minivlm",
        version=__version__,
        sha=None,
        docker_label=None,
        **known,
    )


@router.get("/v1/models")
async def models(service: Served) -> Models:
    """The model that is served."""
    return Models(data=[Model(id=service.name, owned_by="minivlm")])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Numbers for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


# ---- errors


async def _refused(request: Request, error: Refused) -> Response:
    service_of(request).metrics.failures.labels(err=error.kind or str(error.status_code)).inc()
    if "/v1/" in request.url.path:
        return JSONResponse(error.openai, error.status_code, error.headers)
    if error.kind is None:
        return PlainTextResponse(error.detail, error.status_code, error.headers)
    return JSONResponse(error.body, error.status_code, error.headers)


async def _told(request: Request, error: Exception) -> Response:
    return await _refused(request, refused(error))


async def _unfit(request: Request, error: RequestValidationError) -> Response:
    """A body of the wrong shape. TGI's web framework says so in plain text, as it does of a wrong content type."""
    content_type = request.headers.get("content-type", "")
    if isinstance(error.body, bytes) or (error.body is None and "json" not in content_type):
        return await _refused(request, Refused(415, "Expected request with `Content-Type: application/json`"))
    if error.body is None:
        return await _refused(request, Refused(400, "Failed to parse the request body as JSON: it is empty or null"))
    deepest = max(error.errors(), key=lambda one: len(one["loc"]))  # of several types that were tried, the nearest
    # pydantic puts names of types such as "list[Part]" between the fields.
    where = ".".join(str(part) for part in deepest["loc"][1:] if "[" not in str(part))
    text = f"Failed to deserialize the JSON body into the target type: {where}: {deepest['msg']}"
    return await _refused(request, Refused(422, text))


async def _http(request: Request, error: HTTPException) -> Response:
    """An unknown route or method, in JSON that names it."""
    body = {"error": f"{request.method} {request.url.path[:100]}: {error.detail}", "error_type": "not_found"}
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=GONE)


async def _mistake(request: Request, error: Exception) -> Response:
    """Our own mistake outside of a `StrictRoute`; uvicorn logs it."""
    return await _refused(request, internal())


HANDLERS: dict[type[Exception], Callable[..., Any]] = {
    Refused: _refused,
    **dict.fromkeys(TOLD, _told),
    RequestValidationError: _unfit,
    HTTPException: _http,
    ClientGone: _gone,
    Exception: _mistake,
}
