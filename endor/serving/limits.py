"""What a server takes from a client, and the checks of a request's fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from endor.errors import ConfigError


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: Of HTTP.
        kind: OpenAI's `type` of the error.
    """

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes.

    Attributes:
        max_tokens: New tokens of one answer; also what is made when a request names no number.
        max_request_bytes: Of one request's body.
        max_waiting: Requests at once, the one that is answered included; more are told to come
            back.
        context: Tokens of prompt and answer together, as the cache was planned for.
    """

    max_tokens: int = 512
    max_request_bytes: int = 1 << 20
    max_waiting: int = 32
    context: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_request_bytes", "max_waiting", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r:.40}")


TOKEN_FIELDS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
}
"""By route, the fields that say how many tokens to make; the first that is given counts."""

REFUSED = ("generation_config",)
"""Fields that would let a client set what the server's owner has to."""

_RANGES = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "frequency_penalty": (-2.0, 2.0)}


def check_body(route: str, body: Any, limits: Limits) -> dict[str, Any]:
    """Return the body of a request with the number of tokens filled in.

    Raises:
        RequestError: A field is missing, of another kind, or beyond the limits.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {type(body).__name__}")
    for name in REFUSED:
        if name in body:
            raise RequestError(f"{name}: is not taken; give max_tokens, temperature, top_p, stop")
    _check_content(route, body)
    for name, (low, high) in _RANGES.items():
        value = body.get(name)
        if value is not None and (not _is_number(value) or not low <= value <= high):
            raise RequestError(f"{name}: must be a number from {low:g} to {high:g}, got {value!r}")
    seed = body.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise RequestError(f"seed: must be an integer, got {seed!r:.40}")
    if body.get("n") not in (None, 1):
        raise RequestError("n: one answer at a time; ask again for another")
    stop = body.get("stop")
    if stop is not None and not isinstance(stop, str):
        _check_stop(stop)
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise RequestError(f"stream: must be true or false, got {stream!r:.40}")
    fields = TOKEN_FIELDS[route]
    given = [name for name in fields if body.get(name) is not None]
    for name in given:
        value = body[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(f"{name}: must be an integer of at least 1, got {value!r:.40}")
        if value > limits.max_tokens:
            raise RequestError(f"{name}: at most {limits.max_tokens} on this server, got {value}")
    return body if given else body | {fields[-1]: limits.max_tokens}


def tokens_asked(route: str, body: Mapping[str, Any]) -> int:
    """Return how many tokens a checked body asks for."""
    return int(next(body[name] for name in TOKEN_FIELDS[route] if body.get(name) is not None))


def _check_content(route: str, body: Mapping[str, Any]) -> None:
    if route == "/v1/completions":
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise RequestError("prompt: must be a text that is not empty")
    elif route == "/v1/chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages: must be a list of at least one message")
        for at, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(f"messages[{at}]: must be an object with a role and content")
            content = message.get("content")
            if not isinstance(content, str | list) and not (
                content is None and message.get("tool_calls")
            ):
                raise RequestError(f"messages[{at}].content: must be a text or a list of parts")
    elif not isinstance(body.get("input"), str | list) or not body["input"]:
        raise RequestError("input: must be a text or a list that is not empty")


def _check_stop(stop: Any) -> None:
    fine = isinstance(stop, list) and 1 <= len(stop) <= 4
    if not fine or not all(isinstance(item, str) and item for item in stop):
        raise RequestError("stop: must be a text or up to four of them")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
