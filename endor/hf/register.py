"""Makes transformers and diffusers know packed checkpoints, whichever is imported first.

transformers is large, so `import endor` must not import it. A finder on `sys.meta_path` waits for
the module that holds the table of quantizers and adds ours when that module has run. Ours are found
by name: they import this module.
"""

from importlib import import_module
from typing import Any

from endor.dependencies import changed, require
from endor.hf.after_import import AfterImport
from endor.hf.config import METHOD

TABLE = "transformers.quantizers.auto"
_NEEDED = (
    "AUTO_QUANTIZER_MAPPING",
    "LOADING_ATTRIBUTES_CONFIG_TYPES",
    "register_quantization_config",
    "register_quantizer",
)


def install() -> None:
    """Register the quantizers now, if the libraries have their tables, else when they get them."""
    _FINDER.install()
    _DIFFUSERS.install()


def register(table: Any) -> None:
    """Add the config and the quantizer to transformers' tables; once is enough, twice is no harm.

    Args:
        table: The module `transformers.quantizers.auto`.
    """
    ours: Any = import_module("endor.hf.quantizer")
    if not hasattr(ours, "EndorQuantizer"):
        return  # it is what imports transformers right now, and registers itself when it is done
    EndorConfig, EndorQuantizer = ours.EndorConfig, ours.EndorQuantizer
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
    import_module("endor.hf.diffusion").register(table)


_FINDER = AfterImport(TABLE, register)
_DIFFUSERS = AfterImport("diffusers.quantizers.auto", register_diffusers)
