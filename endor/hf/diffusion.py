"""The quantizer `endor` of diffusers: packed linear layers in stock model classes.

diffusers finds the shards by an index of its own name, which packing writes beside ours. It calls,
in this order: `update_torch_dtype`, `update_device_map`, `maybe_update_loaded_keys` with the list
of files that it will load, then the two `_process_model` steps around the loading. As with
transformers, the unpacked parameters come from a file in memory that takes the place of that list.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.index import read_packed_index
from endor.checkpoint.loadable import open_layouts, refuse_quantized
from endor.dependencies import changed, require
from endor.errors import CheckpointError, ConfigError, OutputExistsError, ShapeError
from endor.hf import adapters
from endor.hf import model as behaviour
from endor.hf.device_map import DeviceMap, host_reader, read_device_map
from endor.hf.linear import pack_linear
from endor.hf.loading import PlainFile, check_taken, plain_file
from endor.hf.placing import Placing
from endor.hf.quantization_config import EndorConfig
from endor.models.assignment import Assignment
from endor.models.layers import is_linear
from endor.planning.units import Part, WeightSpec
from endor.storage import FileLayout, open_reader

_CALLED = (
    "validate_environment",
    "update_torch_dtype",
    "update_device_map",
    "maybe_update_loaded_keys",
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
)
"""What diffusers calls of a quantizer; of another name it would load without Endor."""


class EndorDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads a packed model of diffusers."""

    requires_calibration = True
    # A quantizer without it would have modules that must be float32 loaded in the model's dtype.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: EndorConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.device_map = DeviceMap()
        self._dtype: torch.dtype | None = None
        self._keys: list[str] = []
        self._files: list[str] = []
        self._layouts: list[FileLayout] = []
        self._assignment = Assignment()
        self._dtypes: dict[str, torch.dtype] = {}
        self._plain: PlainFile | None = None

    @property
    def is_serializable(self) -> bool:
        """False: diffusers cannot write packed files; the model's `save_pretrained` copies."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained on it."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse weights that were quantized before."""
        self.quantization_config.check()
        refuse_quantized(self.quantization_config.packed)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember the dtype; None means what the class makes its parameters of."""
        self._dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: Any) -> None:
        """Note where the model is to compute; diffusers loads the rest on the processor.

        Raises:
            BackendError: A device that packed weights do not run on.
            ConfigError: It is no device map.
        """
        self.device_map = read_device_map(device_map)
        self.device_map.devices()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> Any:
        """Keep hold of both lists: what is loaded is known when the model is."""
        self._keys, self._files = loaded_keys, checkpoint_files
        return loaded_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Return nothing: a parameter that is neither packed nor stored was refused before."""
        return []

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        if not self._files:
            raise changed("diffusers", "it did not say which files it is about to load")
        read_packed_index(Path(self._files[0]).parent)
        self._layouts = open_layouts(self._files)
        plan = self._assignment = assign_by_name(model, self._layouts)
        for spec in plan.weights:
            kept = any(part in spec.target.split(".") for part in keep_in_fp32_modules)
            own = model.get_parameter(spec.target).dtype
            self._dtypes[spec.target] = torch.float32 if kept else self._dtype or own
        for name, spec in plan.linears.items():
            pack_linear(
                model, name, self._dtypes[spec.target], exact=self.quantization_config.exact
            )
        packed = {spec.name for spec in plan.weights}
        with open_reader(host_reader(self.quantization_config.reader)) as reader:
            self._plain = plain_file(
                self._layouts, packed, reader, verify=self.quantization_config.verify
            )
        self._keys[:] = [
            name for layout in self._layouts for name in layout.tensors if name not in packed
        ]
        self._files[:] = [self._plain.path]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._plain is not None:
            check_taken(self._plain, model)
            self._plain.close()
            self._plain = None
        plan, config = self._assignment, self.quantization_config
        specs = [(spec, self._dtypes[spec.target]) for spec in plan.weights]
        dtype = self._dtype or torch.float32
        opened = Placing(model, self._layouts, plan, specs, config, self.device_map, dtype).open()
        for name, spec in plan.linears.items():
            model.get_submodule(name).bind(opened.store.weights[spec.name])
        adapters.watch.install()
        self._layouts, self._assignment, self._dtypes = [], Assignment(), {}
        self._keys, self._files = [], []
        config.placement = None
        behaviour.adopt(model, opened.store, opened.plan, save=save_pretrained, library="diffusers")
        return model


def assign_by_name(model: nn.Module, layouts: Sequence[FileLayout]) -> Assignment:
    """Return where each packed tensor goes in a model whose parameters have the stored names.

    Raises:
        CheckpointError: The model has no such parameter, or one that is not stored.
        ShapeError: Stored and expected shapes differ.
    """
    out = Assignment()
    own = dict(model.named_parameters(remove_duplicate=False))
    stored = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    for name, spec in stored.items():
        if spec.codec == "dense":
            continue
        if name not in own:
            raise CheckpointError(
                f"{name}: packed, but {type(model).__name__} has no such parameter; load it with "
                "the class that config.json names"
            )
        if tuple(own[name].shape) != spec.shape:
            raise ShapeError(
                f"{name}: stored as {list(spec.shape)}, but {type(model).__name__} has "
                f"{list(own[name].shape)}; is config.json the checkpoint's own?"
            )
        module_name, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_linear(model.get_submodule(module_name)):
            part = Part(name, 0, spec.numel, 0)
            out.linears[module_name] = WeightSpec(name, tuple(spec.shape), (part,), name)
            out.claimed.add(name)
        else:
            out.dense.append(name)
    missing = next((name for name in own if name not in stored), None)
    if missing is not None:
        raise CheckpointError(
            f"{missing}: {type(model).__name__} needs it, and it is not in the checkpoint; convert "
            "it again"
        )
    return out


def save_pretrained(
    self: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    """Copy the packed model to `save_directory`, as it was loaded.

    Raises:
        ConfigError: Changed parameters, an upload or another variant is to be saved.
        OutputExistsError: The directory holds a packed checkpoint already.
    """
    if push_to_hub or variant:
        raise ConfigError(
            "save_pretrained copies a packed model: push_to_hub and variant do not apply; unpack "
            "it for an ordinary one"
        )
    behaviour.refuse_changed(self)
    if not is_main_process:
        return
    target, source = Path(save_directory), self.endor.layouts[0].path.parent
    if (target / PACKED_INDEX_NAME).exists():
        raise OutputExistsError(f"{target}: holds a packed checkpoint; choose another directory")
    target.mkdir(parents=True, exist_ok=True)
    for path in [*(layout.path for layout in self.endor.layouts), *sorted(source.glob("*.json"))]:
        behaviour.copy_whole(path, target / path.name)


def register(table: Any) -> None:
    """Add config and quantizer to diffusers' tables, and let options reach them.

    diffusers drops a config that is passed for a checkpoint that has one, and with it the budget.

    Args:
        table: The module `diffusers.quantizers.auto`.
    """
    names = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING", "DiffusersAutoQuantizer")
    require("diffusers", table, names)
    table.AUTO_QUANTIZER_MAPPING["endor"] = EndorDiffusersQuantizer
    table.AUTO_QUANTIZATION_CONFIG_MAPPING["endor"] = EndorConfig
    auto = table.DiffusersAutoQuantizer
    require("diffusers", auto, ["merge_quantization_configs"])
    merge = auto.merge_quantization_configs
    if getattr(merge, "is_endor", False):
        return

    def merged(stored: Any, given: Any) -> Any:
        if not isinstance(given, EndorConfig):
            return merge(stored, given)
        found = EndorConfig.from_dict(stored) if isinstance(stored, dict) else stored
        if not isinstance(found, EndorConfig):
            raise ConfigError("quantization_config: is Endor's, and the model was not packed by it")
        found.__dict__.update(given.options)
        return found

    merged.is_endor = True  # type: ignore[attr-defined]
    auto.merge_quantization_configs = staticmethod(merged)


require("diffusers", DiffusersQuantizer, _CALLED)
