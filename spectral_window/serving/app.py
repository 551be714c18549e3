"""HTTP: the routes of OpenAI's interface, keys, limits, errors in its shape, metrics and the page.

POST   /v1/completions, /v1/chat/completions
GET    /v1/models, /v1/models/NAME
GET    /v1/sessions           names and bytes
DELETE /v1/sessions/NAME
GET    /health, /metrics, /   and the page's script and style sheet
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spectral_window.errors import (
    DivergedError,
    IntegrityError,
    ResourceError,
    SpectralWindowError,
    UserError,
    is_out_of_memory,
)
from spectral_window.serving import protocol
from spectral_window.serving.protocol import ChatRequest, CompletionRequest
from spectral_window.serving.scheduler import QueueFull, Stopping
from spectral_window.serving.service import Answer, NoSuchModel, Service
from spectral_window.serving.sessions import NoSuchSession, SessionBusy

Call = Callable[[], Awaitable[Response]]

# The first class that an error is of decides: status, OpenAI's type and code.
ANSWERS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (Stopping, 503, "server_error", "stopping"),
    (SessionBusy, 409, "invalid_request_error", "session_busy"),
    (NoSuchModel, 404, "invalid_request_error", "model_not_found"),
    (NoSuchSession, 404, "invalid_request_error", "session_not_found"),
    (UserError, 400, "invalid_request_error", None),
    (IntegrityError, 422, "invalid_request_error", "damaged"),
    (ResourceError, 507, "server_error", "no_space"),
    (DivergedError, 500, "server_error", "not_finite"),
)
RETRY_SECONDS = 1  # after 429 and 503
PAGE = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
DISCARDED = 16  # times the largest body: so much more of one too large is read, so that its sender
# gets the answer and not a broken connection


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: what answers.
        api_key: what requests to /v1 and /metrics must bring as `Authorization: Bearer KEY`; None
            lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(title="spectral-window", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Guard,
        api_key=api_key,
        body_bytes=service.limits.body_bytes,
        answered=service.metrics.answered,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(SpectralWindowError, _failed)
    app.add_exception_handler(Exception, _failed)
    model = service.describe()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise NoSuchModel(f"no model {name!r} (model): this server has {service.name!r}")
        return model

    @app.get("/v1/sessions")
    async def sessions() -> dict[str, Any]:
        store = service.sessions
        sizes = {} if store is None else await asyncio.to_thread(store.sizes)
        listed = [{"id": name, "object": "session", "bytes": sizes[name]} for name in sizes]
        return {"object": "list", "data": listed}

    @app.delete("/v1/sessions/{name:path}")
    async def delete_session(name: str) -> dict[str, Any]:
        if service.sessions is None:
            raise NoSuchSession(f"no session {name!r} (session_id): this server keeps none")
        await asyncio.to_thread(service.sessions.delete, name)
        return {"id": name, "object": "session", "deleted": True}

    @app.get("/health")
    async def health() -> Response:
        if service.scheduler.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.show(), media_type="text/plain; version=0.0.4")

    for path, name in PAGE.items():
        content = (files("spectral_window.serving") / name).read_bytes()
        media = MEDIA[name.rpartition(".")[2]]
        app.get(path, include_in_schema=False)(_static(content, media))

    return app


def _static(content: bytes, media: str) -> Call:
    async def send() -> Response:
        return Response(content, media_type=media, headers={"Cache-Control": "no-cache"})

    return send


async def _answer(
    service: Service, body: CompletionRequest | ChatRequest, request: Request
) -> Response:
    """Answer a request, at once or as a stream; end its texts if the client goes."""
    answer = await service.answer(body)
    if body.stream:
        return EventStream(answer)
    gone = asyncio.create_task(_until_gone(request))
    whole = asyncio.create_task(answer.whole())
    try:
        await asyncio.wait((gone, whole), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(whole.result())
    finally:
        gone.cancel()
        whole.cancel()
        answer.close()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """An answer as server-sent events. When it ends, however it does, so do its texts."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            _events(answer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


async def _events(answer: Answer) -> AsyncIterator[str]:
    """Yield the events of a stream. An error after its beginning is its last event."""
    try:
        async for chunk in answer.chunks():
            yield _event(chunk)
    except Exception as error:
        yield _event(explain(error)[1])
    else:
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    # In ASCII: some clients cut lines at U+2028 and its like too.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


# ------------------------------------------------------------------------------- errors


def explain(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for an error, by its class."""
    message = " ".join(str(error).split())
    for kind, status, name, code in ANSWERS:
        if isinstance(error, kind):
            return status, protocol.error(message, name, code=code)
    if is_out_of_memory(error):
        return 507, protocol.error("out of memory (server): ask for less, or later", "server_error")
    return 500, protocol.error(f"{type(error).__name__}: {message} (a bug)", "server_error")


def _error(status: int, body: dict[str, Any]) -> JSONResponse:
    retry = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
    return JSONResponse(body, status, headers=retry)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(*explain(error))


async def _refused(request: Request, error: Exception) -> Response:
    """An unknown route, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail} ({request.method} {request.url.path}): see /v1/models"
    return _error(error.status_code, protocol.error(message))


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is not JSON, or not of the right fields."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return _error(400, protocol.error(f"the body is not JSON, {what} (body): send JSON"))
    if first["type"] == "extra_forbidden":
        what = "this server knows no such field; leave it out"
    param = ".".join(path) or None
    return _error(400, protocol.error(f"{what} ({param or 'body'})", param=param))


# ------------------------------------------------------------------------------- what comes first


class Guard:
    """Checks every request before the application reads it, and marks every answer.

    Args:
        app: what comes after.
        api_key: see `create_app`.
        body_bytes: larger bodies are refused.
        answered: called with the route and the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        body_bytes: int,
        answered: Callable[[str, int], None],
    ) -> None:
        self.app, self.body_bytes, self.answered = app, body_bytes, answered
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                marks = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *marks]}
                # (a path that no route has is not a name of its own: anybody may invent some)
                route = getattr(scope.get("route"), "path", "none")
                self.answered(route, message["status"])
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send_marked)
            return
        body = await self._read(receive)
        if body is None:
            message = f"the body is larger than {self.body_bytes:,} bytes (body): send less"
            await _error(413, protocol.error(message))(scope, receive, send_marked)
            return
        parts = iter([body])

        async def receive_read() -> Message:
            for part in parts:
                return {"type": "http.request", "body": part, "more_body": False}
            return await receive()

        await self.app(scope, receive_read, send_marked)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        guarded = scope["path"].startswith("/v1/") or scope["path"] == "/metrics"
        if self._key is not None and guarded:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                body = protocol.error(
                    "no valid key (Authorization): send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
                return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                message = "the body is not JSON (Content-Type): send application/json"
                return _error(415, protocol.error(message))
        return None

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body; None if it is too large, or its sender went."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self.body_bytes:
                parts.append(part)
            if size > DISCARDED * self.body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts) if size <= self.body_bytes else None
