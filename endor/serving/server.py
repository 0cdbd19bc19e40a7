"""Load a model and answer for it until told to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from endor.dependencies import require
from endor.errors import BackendError
from endor.serving.limits import Limits

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")


def check_installed() -> None:
    """Raise before a model is loaded where the web libraries are missing.

    Raises:
        BackendError: One is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BackendError(f"serving needs {', '.join(missing)}: pip install 'endor-sparse[serve]'")


def serve(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    batch: int = 1,
    grace_s: int = 30,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Answer for `model` until SIGINT or SIGTERM; answers that are being made are finished first.

    Args:
        model: A transformers model that generates.
        tokenizer: Its fast tokenizer.
        name: What clients call it.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        api_key: What clients must send; anybody may ask when None.
        limits: What is taken from clients.
        batch: Answers that are made at once: each weight is read and expanded once for all of them.
        grace_s: How long open answers may take once it shall stop.
        ready: Called with the address once it listens.

    Raises:
        BackendError: The web libraries are missing.
        OSError: The address cannot be listened on.
    """
    check_installed()
    import socket

    import uvicorn

    from endor.serving.app import build_app

    require("uvicorn", uvicorn.Server, ("capture_signals", "handle_exit", "startup"))

    class Server(uvicorn.Server):  # type: ignore[misc]
        """Leaves on a signal without passing it on, and says when it listens."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            kept = {
                one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                yield
            finally:
                for one, handler in kept.items():
                    signal.signal(one, handler)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if ready is not None and self.started:
                ready(address)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BackendError(
                f"cannot listen on {host}:{port}: {reason}; choose another --host or --port"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        app = build_app(
            name, model, tokenizer, limits=limits, api_key=api_key, host=host, batch=batch
        )
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=grace_s, access_log=False
        )
        Server(config).run(sockets=[listener])


def served_name(packed: Path) -> str:
    """Return what a checkpoint's model is called where nobody chose a name."""
    return packed.resolve().name or "model"
