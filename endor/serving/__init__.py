"""One model behind OpenAI's HTTP interface, spoken by transformers' handlers."""

from typing import TYPE_CHECKING, Any

from endor.serving.limits import Limits

if TYPE_CHECKING:
    from endor.serving.app import build_app
    from endor.serving.server import serve

__all__ = ["Limits", "build_app", "serve"]


def __getattr__(name: str) -> Any:
    """Import what needs the web libraries on first use."""
    if name == "build_app":
        from endor.serving.app import build_app

        return build_app
    if name == "serve":
        from endor.serving.server import serve

        return serve
    raise AttributeError(f"module 'endor.serving' has no attribute {name!r}")
