"""What Endor takes for granted in the internals of other libraries; docs/dependencies.md lists it.

A name that is gone, or a hook that nobody calls any more, would mean wrong weights or a broken
budget without a word. Where Endor reaches into another library it checks that this took, and raises
what `changed` returns when it did not.
"""

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from endor.errors import DependencyError


def installed(library: str) -> str:
    """Return the version of a library that is installed, `unknown` when its metadata is gone."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"


def changed(library: str, found: str) -> DependencyError:
    """Return the error for a library that does not do what Endor relies on.

    Args:
        library: Its name in the package registry.
        found: What is different.
    """
    return DependencyError(
        f"{library} {installed(library)}: {found}, which Endor relies on; install another version "
        f"of {library} (see docs/dependencies.md), or a newer Endor"
    )


def internals(module: str, *names: str) -> tuple[Any, ...]:
    """Return names of a module that are no part of its library's public surface.

    Raises:
        DependencyError: The module or a name is gone.
    """
    library = module.partition(".")[0]
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library or error.name == library:
            raise  # not installed, or itself in want of something
        raise changed(library, f"it has no module {module}") from None
    require(library, found, names)
    return tuple(getattr(found, name) for name in names)


def require(library: str, owner: Any, names: Iterable[str]) -> None:
    """Raise unless a class or module of a library has these names.

    Used where Endor overrides methods that the library calls: an override that overrides nothing
    is never called.

    Raises:
        DependencyError: One is gone.
    """
    for name in names:
        if not hasattr(owner, name):
            where = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
            raise changed(library, f"{where} has no {name}")
