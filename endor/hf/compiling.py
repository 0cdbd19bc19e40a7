"""torch.compile and torch.export: packed layers run between compiled graphs, and are not exported.

What a packed layer does (reading, expanding, waiting for the disk) is no graph. torch.compile
breaks its graph there and compiles what lies between; torch.export takes one whole graph only.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from endor.dependencies import require
from endor.errors import ConfigError
from endor.hf.after_import import AfterImport

Method = TypeVar("Method", bound=Callable[..., Any])

_REASON = "packed weights are expanded between graphs; leave out fullgraph=True, or unpack"


def _call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


_apart: Callable[..., Any] = _call


def outside_graphs(method: Method) -> Method:
    """Return `method` so that torch.compile calls it, and torch.export refuses it in a sentence."""

    @functools.wraps(method)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return method(*args, **kwargs)
        if torch.compiler.is_exporting():
            raise ConfigError(
                "a model with packed weights cannot be exported, since its weights are read while "
                "it runs: unpack the checkpoint (endor unpack) and export the result"
            )
        return _apart(method, *args, **kwargs)

    return dispatched  # type: ignore[return-value]


def _keep_out(dynamo: Any) -> None:
    """Have dynamo call packed layers; it can say so only once it is there."""
    global _apart
    require("torch", dynamo, ["disable"])
    _apart = dynamo.disable(_call, reason=_REASON)


AfterImport("torch._dynamo", _keep_out).install()
