"""The app: OpenAI's paths and ours, as FastAPI routes of a service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import headstart
from headstart.serve.answering import EventStream, unless_gone
from headstart.serve.errors import ApiError, answer_error
from headstart.serve.metrics import CONTENT_TYPE
from headstart.serve.playground import page_info
from headstart.serve.preparing import Prepared
from headstart.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from headstart.serve.security import Guard
from headstart.serve.service import STOPPING, Service

PAGE = Path(__file__).parent / "page"  # files of the playground, served where the folder is there
_GONE = 499  # the status, which nobody sees, of a request whose client went away


def make_app(service: Service) -> ASGIApp:
    """The app of a service, with its guard."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="Headstart", version=headstart.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    for kind in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer_error)
    _add_answers(app, service)
    _add_models(app, service)
    _add_state(app, service)
    for api in ("/v1/{rest:path}", "/playground/{rest:path}"):  # not the page's
        app.add_route(api, _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Guard(app, service.settings)


async def _unknown(request: Request) -> Response:
    """Refuse what no other route takes, so that the page's files are not searched for it."""
    if any(getattr(route, "path", None) == request.url.path for route in request.app.routes):
        raise ApiError(405, f"{request.method} is not how this path is asked")
    raise ApiError(404, "there is no such path; /openapi.json lists those that there are")


# -- answers ----------------------------------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Annotated[ChatRequest, Body()], request: Request) -> Response:
        """Answer a conversation."""
        prepared = await service.in_thread(service.preparer.chat, body, _user(request, body))
        return await _answer(service, prepared, body, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: Annotated[CompletionRequest, Body()], request: Request) -> Response:
        """Continue a text."""
        prepared = await service.in_thread(service.preparer.completion, body, _user(request, body))
        return await _answer(service, prepared, body, request)

    @app.post("/tokenize", response_model=None)
    async def tokenize(body: Annotated[TokenizeRequest, Body()]) -> Response:
        """The tokens of a text or a conversation."""
        tokens = await service.in_thread(service.preparer.tokenize, body)
        strings = {"token_strs": [service.texts.text(token) for token in tokens]} if body.return_token_strs else {}
        return JSONResponse({"count": len(tokens), "max_model_len": service.lanes[0].most_tokens, "tokens": tokens} | strings)

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: Annotated[DetokenizeRequest, Body()]) -> Response:
        """The text of some tokens."""
        return JSONResponse({"prompt": await service.in_thread(service.preparer.detokenize, body.model, body.tokens)})


def _user(request: Request, body: Sampling) -> str:
    """Whose turn in the queue a request takes."""
    return f"{request.scope.get('headstart.user', '')}/{body.user or ''}"


async def _answer(service: Service, prepared: Prepared, body: Sampling, request: Request) -> Response:
    answering = service.answering(prepared, body)
    is_streamed = False
    try:
        await unless_gone(request.receive, answering.start())
        if body.stream:
            is_streamed = True
            return EventStream(answering.events(), answering.close, service.settings.slow_seconds)
        return JSONResponse(await unless_gone(request.receive, answering.whole()))
    except ClientDisconnect:
        return Response(status_code=_GONE)
    finally:
        if not is_streamed:
            answering.close()


# -- models -----------------------------------------------------------------------------------------------------------------


def _add_models(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def model() -> dict[str, Any]:
        lanes = service.lanes
        return {
            "id": service.settings.model,
            "object": "model",
            "created": created,
            "owned_by": "headstart",
            "max_model_len": lanes[0].most_tokens,
            "drafters": list(dict.fromkeys(lane.drafter for lane in lanes)),
            "accept": list(dict.fromkeys(lane.accept for lane in lanes)),
            "is_exact": lanes[0].engine.target.is_exact,
        }

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """The one model of this server."""
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one_model(name: str) -> Response:
        """A model by its name."""
        service.preparer.check_model(name)
        return JSONResponse(model())


# -- state ------------------------------------------------------------------------------------------------------------------


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether answers can be made."""
        if service.trouble is not None:
            raise ApiError(503, service.trouble, code="unhealthy")
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether new requests are taken."""
        if service.is_stopping:
            raise STOPPING
        return await health()

    @app.get("/playground/info", response_model=None)
    async def playground() -> Response:
        """What the page at / shows of this server."""
        return JSONResponse(page_info(service))

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)
