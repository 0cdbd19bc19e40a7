"""The loading options as transformers and diffusers take them, with the checkpoint's own."""

from collections.abc import Mapping
from typing import Any, Unpack, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from endor.errors import FormatError
from endor.hf.config import METHOD, OPTIONS, Loading, settled, spelled_out
from endor.storage.layout import FORMAT_VERSION, VERSIONS


class _Method(str):
    """The name of the method; diffusers expects a member of its own enumeration."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


class EndorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a packed checkpoint is loaded: pass it as `quantization_config`.

    Args:
        packed: What the checkpoint's own config says; kept when the model is saved.
        options: As for `endor.load_model`; see `endor.hf.Loading`.

    Raises:
        ConfigError: An option makes no sense.
    """

    @spelled_out
    def __init__(
        self, *, packed: Mapping[str, Any] | None = None, **options: Unpack[Loading]
    ) -> None:
        self.quant_method = _Method(METHOD)
        self.packed = dict(packed or {"quant_method": "endor", "format_version": FORMAT_VERSION})
        self.__dict__.update(settled(options))

    @property
    def options(self) -> Loading:
        """The options, as they are now."""
        return cast(Loading, {name: getattr(self, name) for name in OPTIONS})

    def check(self) -> None:
        """Settle the options again: attributes may have been set since.

        Raises:
            ConfigError: One makes no sense.
        """
        self.__dict__.update(settled(self.options))

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config in a checkpoint's `quantization_config`; unknown members are kept.

        Members that have the name of a loading option are ignored: how a checkpoint is loaded, and
        whether it is checked, is for whoever loads it to say, not for the checkpoint.
        """
        packed = {key: value for key, value in config_dict.items() if key not in OPTIONS}
        version = packed.get("format_version")
        if version not in VERSIONS:
            raise FormatError(
                f"quantization_config: format_version must be {VERSIONS[0]} to {VERSIONS[-1]}, "
                f"got {version!r}; a newer Endor may read this checkpoint"
            )
        config = cls(packed=packed)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into a saved config: the checkpoint's own members."""
        return dict(self.packed)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute: transformers asks a config that it was given twice like a dict."""
        return getattr(self, key, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a caller of `from_pretrained` may set."""
        return dict(self.options)
