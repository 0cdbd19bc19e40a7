"""A step behind the import of a module that may be imported later, or never."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class AfterImport:
    """A finder that finds nothing itself: puts a step behind the execution of one module.

    Args:
        module: Its full name.
        step: Called with the module.
    """

    def __init__(self, module: str, step: Callable[[Any], None]) -> None:
        self._module = module
        self._step = step
        self._searching = False
        self._ran = False

    def install(self) -> None:
        """Do the step now, if the module has run already, else when it has."""
        module = sys.modules.get(self._module)
        running = getattr(getattr(module, "__spec__", None), "_initializing", False)
        if module is not None and (self._ran or not running):
            self._step(module)
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != self._module or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_step(module: ModuleType) -> None:
            run(module)
            self.uninstall()
            self._ran = True
            self._step(module)

        spec.loader.exec_module = run_and_step  # type: ignore[method-assign]
        return spec
