"""vLLM's prefetching offloader on the CPU: its storage, pool and schedule, copies at once.

`PrefetchOffloader` needs CUDA streams. Here is what it does without them: parameters of a decoder
layer move to storage of their own while the model is built, are found again after loading, and
become views of buffers that layers share, filled ahead of each layer's use.
"""

from collections.abc import Generator
from typing import Any

import torch
from vllm.model_executor.offloader import PrefetchOffloader
from vllm.model_executor.offloader.prefetch import (
    ParamInfo,
    StaticBufferPool,
    _CpuParamOffloader,
    _get_next_prefetch_index,
)

STEP = 2
"""Layers ahead, and buffers of each kind."""


class SynchronousOffloader(PrefetchOffloader):
    """Every decoder layer is offloaded, `STEP` ahead."""

    def __init__(self) -> None:
        self.layers: list[dict[str, _CpuParamOffloader]] = []
        self.copied_bytes = 0
        self.pool: StaticBufferPool | None = None

    def wrap_modules(
        self, modules_generator: Generator[torch.nn.Module, None, None], prefix: str = ""
    ) -> list[torch.nn.Module]:
        modules = []
        for index, module in enumerate(modules_generator):
            names = [name for name, _ in module.named_parameters()]
            self.layers.append({name: _CpuParamOffloader(module, name) for name in names})
            self._copy_ahead_after(module, index)
            modules.append(module)
        return modules

    def post_init(self) -> None:
        for layer in self.layers:
            for parameter in layer.values():
                parameter.sync_cpu_storage()
        infos = [
            ParamInfo(name, tuple(data.shape), tuple(data.stride()), data.dtype)
            for layer in self.layers
            for name, data in ((name, each._cpu_storage) for name, each in layer.items())
        ]
        self.pool = StaticBufferPool(infos, STEP, torch.device("cpu"))
        for index, layer in enumerate(self.layers):
            for name, each in layer.items():
                data = each._cpu_storage
                shape, stride = tuple(data.shape), tuple(data.stride())
                buffer = self.pool.get_buffer(name, shape, stride, data.dtype, index % STEP)
                each.assign_static_buffer(buffer)
        for index in range(STEP):
            self._copy(index)

    def summary(self) -> dict[str, Any]:
        """Return what there are of buffers, and what was copied."""
        assert self.pool is not None
        return {
            "names": len({name for layer in self.layers for name in layer}),
            "kinds_of_buffers": len(self.pool._buffers),
            "layer_bytes": [
                sum(each._cpu_storage.nbytes for each in layer.values()) for layer in self.layers
            ],
            "copied_bytes": self.copied_bytes,
        }

    def join_after_forward(self) -> None:
        return

    def sync_prev_onload(self) -> None:
        return

    def _copy(self, index: int) -> None:
        for each in self.layers[index].values():
            each._gpu_buffer.copy_(each._cpu_storage)
            self.copied_bytes += each._cpu_storage.nbytes

    def _copy_ahead_after(self, module: torch.nn.Module, index: int) -> None:
        forward = module.forward

        def copying(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._copy(_get_next_prefetch_index(index, STEP, len(self.layers)))
            return out

        module.forward = copying
