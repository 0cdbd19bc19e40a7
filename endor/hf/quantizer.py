"""The transformers quantizer `endor`: replaces packed modules, whose store reads the files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_accelerate_available

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.index import read_packed_index
from endor.checkpoint.loadable import open_layouts, refuse_quantized
from endor.checkpoint.predictors import Predictors
from endor.dependencies import internals, require
from endor.errors import ConfigError
from endor.hf import adapters, pipelines, register
from endor.hf import model as behaviour
from endor.hf.device_map import DeviceMap, host_reader, read_device_map
from endor.hf.experts import (
    EndorExperts,
    ExpertStack,
    bind_experts,
    link_experts,
    pack_experts,
    routes_tokens,
)
from endor.hf.gated import skip_gated
from endor.hf.generation_cache import keep_kv
from endor.hf.linear import FastHead, pack_linear
from endor.hf.loading import PlainFile, check_taken, plain_file
from endor.hf.packed_layer import PackedLayer
from endor.hf.packed_module import pack_module
from endor.hf.placing import Placing
from endor.hf.predicted import open_predictors, predict_rows
from endor.hf.quantization_config import EndorConfig
from endor.hf.ranges import stay_on_device
from endor.models.assignment import Assignment, assign
from endor.offload.store import Store
from endor.storage import FileLayout, open_reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNLIMITED = 1 << 60


_CALLED = (
    "validate_environment",
    "update_device_map",
    "adjust_max_memory",
    "update_attn_implementation",
    "update_dtype",
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
)
"""What transformers calls of a quantizer; of another name it would load without Endor."""


class EndorQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a packed checkpoint into stock transformers classes.

    transformers calls, in this order: `update_device_map` and `update_attn_implementation` before
    any file is looked for, `update_dtype`, then the two `_process_model` steps around the loading
    of the unpacked parameters. Those it reads from a file in memory; it never opens packed ones.
    """

    requires_calibration = True
    # What transformers means: adapters may be trained on it. Weights alone, its Trainer refuses.
    is_trainable = True

    def __init__(self, quantization_config: EndorConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.device_map = DeviceMap()
        self._dtype = torch.float32
        self._layouts: list[FileLayout] = []
        self._assignment = Assignment()
        self._dtypes: dict[str, torch.dtype] = {}
        self._plain: PlainFile | None = None
        self._predictors: Predictors | None = None

    def is_serializable(self) -> bool:
        """False: transformers cannot write packed files; the model's `save_pretrained` copies."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse weights that were quantized before; the first thing that transformers asks."""
        self.quantization_config.check()
        refuse_quantized(self.quantization_config.packed)

    def update_device_map(self, device_map: Any) -> Any:
        """Note what a map asks for; let transformers load everything else on the processor.

        An automatic map is all that makes transformers hand `max_memory` on, untouched when it is
        `"sequential"`. It turns into one device, so that accelerate attaches no hooks.

        Raises:
            BackendError: A device that packed weights do not run on.
            ConfigError: It is no device map.
        """
        self.device_map = read_device_map(device_map)
        if self.device_map.mode is None:
            self.device_map.devices()
        return "sequential" if device_map is not None or is_accelerate_available() else None

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Note the limits; give transformers one place where everything fits.

        Raises:
            BackendError: A device that packed weights do not run on.
            ConfigError: A limit makes no sense.
        """
        self.device_map.limit(max_memory)
        self.device_map.devices()
        return {"cpu": UNLIMITED}

    def update_attn_implementation(self, config: Any) -> Any:
        """Point transformers to our index: the last step before it looks for files.

        Raises:
            CheckpointError, FormatError: The index of a directory is missing, or damaged; what
                transformers would say to that is a `KeyError`.
        """
        config.transformers_weights = PACKED_INDEX_NAME
        directory = Path(getattr(config, "_name_or_path", "") or ".")
        if (directory / PACKED_INDEX_NAME).is_file():
            read_packed_index(directory)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype: `preprocess_model` does not hand it on."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ConfigError("a packed checkpoint is loaded from its files, not from a state dict")
        self._layouts = open_layouts(checkpoint_files)
        if self.quantization_config.predict:
            self._predictors = open_predictors(self._layouts[0].path.parent, self._layouts)
        on_device = bool(self.device_map.devices())
        plan = self._assignment = assign(model, self._layouts, self, on_device=on_device)
        self._dtypes = _weight_dtypes(model, plan, self._dtype)
        for name, spec in plan.linears.items():
            pack_linear(
                model, name, self._dtypes[spec.target], exact=self.quantization_config.exact
            )
        model.all_tied_weights_keys = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if target not in plan.claimed and source not in plan.claimed
        }
        for name, stacks in plan.experts.items():
            pack_experts(model.get_submodule(name), list(stacks))
        for name, spec in plan.modules.items():
            pack_module(model.get_submodule(name), self._dtypes[spec.target])
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            r"^__pad__\.",
        }
        packed = {part.tensor for spec in plan.weights for part in spec.parts}
        with open_reader(host_reader(self.quantization_config.reader)) as reader:
            self._plain = plain_file(
                self._layouts, packed, reader, verify=self.quantization_config.verify
            )
        # The list that transformers loads from next.
        checkpoint_files[:] = [self._plain.path]

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        if self._plain is not None:
            check_taken(self._plain, model)
            self._plain.close()
            self._plain = None
        config, plan = self.quantization_config, self._assignment
        specs = [(spec, self._dtypes[spec.target]) for spec in plan.weights]
        opened = Placing(
            model,
            self._layouts,
            plan,
            specs,
            config,
            self.device_map,
            self._dtype,
            named=self._predictors.named if self._predictors else {},
        ).open()
        store = opened.store
        for name, spec in (plan.linears | plan.modules).items():
            layer = model.get_submodule(name)
            assert isinstance(layer, PackedLayer)
            layer.bind(store.weights[spec.name])
        for name, stacks in plan.experts.items():
            experts = model.get_submodule(name)
            assert isinstance(experts, EndorExperts)
            own = not routes_tokens(type(experts).__mro__[2])
            bind_experts(
                experts,
                {
                    leaf: ExpertStack(
                        [store.weights[item.name] for item in stack],
                        exact=config.exact,
                        transposed=f"{name}.{leaf}" in plan.transposed,
                        own_memory=own,
                    )
                    for leaf, stack in stacks.items()
                },
            )
        adapters.watch.install()
        pipelines.watch.install()
        if isinstance(store, Store) and not config.exact:
            FastHead.adopt(model.get_output_embeddings(), store.products.head_rows)
        skip_gated(model)
        if self._predictors is not None:
            predict_rows(model, self._predictors)
            store.predicted = len(self._predictors.matrices)
        link_experts(model, lossy=config.experts == "lossy")
        store.experts = config.experts
        stay_on_device(model)
        behaviour.multiply_as_unquantized(model)
        self._layouts, self._assignment, self._dtypes = [], Assignment(), {}
        self._predictors = None
        config.placement = None
        behaviour.adopt(model, store, opened.plan)
        keep_kv(model, opened.plan.workload.kv if opened.plan else config.kv)
        # Says to pipelines, among others, that the model is where it belongs.
        model.hf_device_map = opened.devices or {"": torch.device("cpu")}
        return model


def _weight_dtypes(
    model: "PreTrainedModel", plan: Assignment, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the dtype that transformers would give each packed parameter."""
    (build_glob_alternation,) = internals(
        "transformers.core_model_loading", "build_glob_alternation"
    )
    require("transformers", type(model), ["_get_dtype_plan"])
    kept = model._get_dtype_plan(dtype)
    pattern, by_group, _ = build_glob_alternation(list(kept)) if kept else (None, {}, {})
    out = {}
    for name in plan.claimed:
        match = pattern.search(name) if pattern else None
        out[name] = kept[by_group[match.lastgroup]] if match else model.get_parameter(name).dtype
    return out


require("transformers", HfQuantizer, _CALLED)
register.install()
