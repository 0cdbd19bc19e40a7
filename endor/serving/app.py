"""The web application: routes, keys, limits, errors in OpenAI's form."""

import asyncio
import hmac
import json
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from endor.errors import EndorError
from endor.serving.engine import SEED, handlers
from endor.serving.limits import Limits, RequestError, check_body
from endor.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CHECK_S = 0.5
"""Between two looks whether a client that waits for a whole answer is still there."""


def build_app(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    batch: int = 1,
) -> FastAPI:
    """Return the application that answers for one model.

    Args:
        name: What clients call the model.
        model: A transformers model that generates.
        tokenizer: Its fast tokenizer.
        limits: What is taken from clients.
        api_key: What they must send as `Authorization: Bearer`; anybody may ask when None.
        host: Where it will listen. On a loopback address requests that name another host are
            refused, so that no web page reaches it under a name of its own.
        batch: Answers that are made at once.
    """
    limits = limits or Limits()
    metrics = Metrics(getattr(model, "endor", None))
    model.generate = metrics.counted(model.generate)
    answering = handlers(name, model, tokenizer, limits, batch)
    app = FastAPI(title="Endor", docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]", "[", host])
    open_requests = 0

    def check_key(request: Request) -> None:
        if api_key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise RequestError(
                "the API key is missing or wrong", status=401, kind="authentication_error"
            )

    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return failure(str(error), error.status, error.kind)

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return failure(f"there is no {request.url.path}", 404, "invalid_request_error")

    async def health() -> dict[str, str]:
        return {"status": "ok", "model": name}

    async def figures(request: Request) -> Response:
        check_key(request)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": answering["/v1/completions"].model_manager.list_models()}

    async def answer(request: Request) -> Response:
        nonlocal open_requests
        check_key(request)
        route = request.url.path
        body = check_body(route, await read_json(request, limits), limits)
        if body.get("model") not in (None, name):
            raise RequestError(
                f"this server has the model {name!r} alone", status=404, kind="model_not_found"
            )
        if open_requests >= limits.max_waiting:
            raise RequestError(
                f"{open_requests} requests wait already; try again later",
                status=429,
                kind="rate_limit_exceeded",
            )
        open_requests += 1
        metrics.waiting.set(open_requests)
        SEED.set(body.pop("seed", None))

        def close() -> None:
            nonlocal open_requests
            open_requests -= 1
            metrics.waiting.set(open_requests)

        try:
            response = await attended(request, answering[route].handle_request(body, new_id()))
        except BaseException:
            close()
            raise
        if isinstance(response, StreamingResponse):
            return Attended(response, close)
        close()
        return response

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(404, unknown)
    for path, route, method in (
        ("/health", health, "GET"),
        ("/metrics", figures, "GET"),
        ("/v1/models", models, "GET"),
        *((path, answer, "POST") for path in answering),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None)
    known = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Counting, metrics=metrics, known=known)
    return app


class Counting:
    """Counts answers by route and status.

    Written against ASGI itself: what `app.middleware("http")` makes hides from the routes that a
    client went away.
    """

    def __init__(self, app: Any, metrics: Metrics, known: frozenset[str]) -> None:
        self._app, self._metrics, self._known = app, metrics, known

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._known else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def new_id() -> str:
    """Return the name of an answer."""
    return f"endor-{uuid.uuid4().hex}"


def failure(message: str, status: int, kind: str) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    error = {"message": message, "type": kind, "code": kind, "param": None}
    return JSONResponse({"error": error}, status_code=status)


async def read_json(request: Request, limits: Limits) -> Any:
    """Return the body of a request.

    Raises:
        RequestError: It is too large, or no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the content-type must be application/json", status=415)
    too_large = RequestError(
        f"a request may have {limits.max_request_bytes} bytes on this server", status=413
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.max_request_bytes:
        raise too_large
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > limits.max_request_bytes:
            raise too_large
    try:
        return json.loads(read)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error!s:.200}") from None


async def attended(request: Request, answer: Any) -> Response:
    """Return what `answer` comes to; end it when the client goes away before.

    Raises:
        RequestError: The model cannot make it of this request.
    """
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=CHECK_S)
            if not task.done() and await request.is_disconnected():
                raise RequestError("the client went away", status=499)
        response: Response = task.result()
        return response
    except HTTPException as error:
        raise RequestError(str(error.detail), status=error.status_code) from error
    except (EndorError, ValueError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        raise RequestError(f"the request cannot be answered: {text}") from error
    except ImportError as error:  # what a chat template or a kind of input would need
        raise RequestError(f"not on this server: {error!s:.200}", status=501) from error
    finally:
        if not task.done():
            task.cancel()


class Attended(StreamingResponse):  # type: ignore[misc]
    """A stream that is closed as soon as its reader is gone, for that ends the generation.

    Args:
        made: The handler's response.
        close: Called at the end, however it ends.
    """

    def __init__(self, made: StreamingResponse, close: Callable[[], None]) -> None:
        super().__init__(made.body_iterator, made.status_code, media_type=made.media_type)
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
            await self.body_iterator.aclose()
