"""Makes transformers and diffusers know packed checkpoints, whichever is imported first.

transformers is large, so `import endor` must not import it. A finder on `sys.meta_path` waits for
the module that holds the table of quantizers and adds ours when that module has run.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from endor.dependencies import changed, require

TABLE = "transformers.quantizers.auto"
METHOD = "endor"
_NEEDED = (
    "AUTO_QUANTIZER_MAPPING",
    "LOADING_ATTRIBUTES_CONFIG_TYPES",
    "register_quantization_config",
    "register_quantizer",
)


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


def install() -> None:
    """Register the quantizers now, if the libraries have their tables, else when they get them."""
    _FINDER.install()
    _DIFFUSERS.install()


def register(table: Any) -> None:
    """Add the config and the quantizer to transformers' tables; once is enough, twice is no harm.

    Args:
        table: The module `transformers.quantizers.auto`.
    """
    ours = sys.modules.get("endor.hf.quantizer")
    if ours is not None and not hasattr(ours, "EndorQuantizer"):
        return  # it is what imports transformers right now, and registers itself when it is done
    from endor.hf.quantizer import EndorConfig, EndorQuantizer

    require("transformers", table, _NEEDED)
    if METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(METHOD)(EndorConfig)
        table.register_quantizer(METHOD)(EndorQuantizer)
    if EndorConfig not in table.LOADING_ATTRIBUTES_CONFIG_TYPES:
        # Without this a `quantization_config=EndorConfig(ram=...)` given by the user is ignored.
        table.LOADING_ATTRIBUTES_CONFIG_TYPES += (EndorConfig,)
    if table.AUTO_QUANTIZER_MAPPING.get(METHOD) is not EndorQuantizer:
        raise changed("transformers", f"it did not take the quantizer {METHOD!r}")


def register_diffusers(table: Any) -> None:
    """Add the quantizer to diffusers' tables; see `endor.hf.diffusion.register`."""
    from endor.hf import diffusion

    diffusion.register(table)


_FINDER = AfterImport(TABLE, register)
_DIFFUSERS = AfterImport("diffusers.quantizers.auto", register_diffusers)
