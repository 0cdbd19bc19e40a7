"""Packing on a Ray cluster: shares as tasks, run again where a worker is lost, then assembled."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from endor.checkpoint.report import PackReport
from endor.errors import BackendError, BusyError, ConfigError
from endor.packing.share_options import check_shareable
from endor.packing.shares import Share, finish_checkpoint, pack_share

SharesDone = Callable[[int, int], None]
"""Called with shares done and shares in all."""

_BUSY_S = 300.0
"""How long a task waits for the lock of a share: one on a lost node may outlive it for a while."""


def pack_distributed(
    model: Path | str,
    out_dir: Path | str,
    *,
    shares: int | None = None,
    cpus: int = 1,
    retries: int = 3,
    overwrite: bool = False,
    progress: SharesDone | None = None,
    **call: Any,
) -> PackReport:
    """Pack a checkpoint on the Ray cluster that this process is connected to, or can find.

    All nodes must see `model` and `out_dir` by the same paths, and have Endor installed. The bytes
    are those of `pack_checkpoint`. A share whose worker or node is lost is packed again elsewhere;
    a run that ends early goes on when it is called again.

    Args:
        model: As for `pack_checkpoint`; a model on the Hub with `stream=True`.
        out_dir: As there.
        shares: Tasks; four for each that the cluster can run at once when omitted, so that one that
            is slow or lost costs little.
        cpus: Of a task, and its threads.
        retries: How often a task whose worker was lost is run again.
        overwrite: Replace `out_dir`.
        progress: Called with shares done and in all.
        call: Options of `pack_checkpoint` that need no calibration.

    Raises:
        BackendError: Ray is not installed, there is no cluster, or a task was lost too often.
        ConfigError, CheckpointError: As for `pack_share` and `finish_checkpoint`.
    """
    ray = _ray()
    if cpus < 1 or retries < 0 or (shares is not None and shares < 1):
        raise ConfigError("shares and cpus must be at least 1, and retries at least 0")
    check_shareable(model, call)
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError:
            raise BackendError(
                "no Ray cluster found; start one (`ray start --head`), or call ray.init() before"
            ) from None
    if shares is None:
        shares = _count(model, 4 * max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus))
    given = {**call, "overwrite": overwrite, "threads": cpus}
    paths = (str(model), str(Path(out_dir).absolute()))
    task = ray.remote(num_cpus=cpus, max_retries=retries)(_pack_one)
    waiting = [task.remote(*paths, number, shares, given) for number in range(1, shares + 1)]
    report = progress or (lambda done, total: None)
    report(0, shares)
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            ray.get(ready)
            report(shares - len(waiting), shares)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"a task was lost more than {retries} times: {_line(error)}; shares that are done are "
            "kept: the same call goes on with the others"
        ) from None
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
    return finish_checkpoint(out_dir, overwrite=overwrite, resume=not overwrite)


def _pack_one(model: str, out: str, number: int, count: int, call: Mapping[str, Any]) -> int:
    """Pack one share, on a worker; return its packed bytes."""
    began = time.monotonic()
    while True:
        try:
            return pack_share(model, out, Share(number, count), **call).sizes.packed_bytes
        except BusyError:
            if time.monotonic() - began > _BUSY_S:
                raise
            time.sleep(1.0)


def _count(model: Path | str, wanted: int) -> int:
    """Return how many shares to make: no more than the layers of a small model have tensors."""
    return wanted if not Path(model).is_dir() else max(1, min(wanted, _records(Path(model))))


def _records(model: Path) -> int:
    from contextlib import closing

    from endor.checkpoint.open import open_source
    from endor.checkpoint.plan import plan_units
    from endor.checkpoint.select import select

    with closing(open_source(model)) as source:
        tensors = source.tensors.values()
        return len(plan_units(tensors, select(tensors)))


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BackendError(
            "pack_distributed needs Ray; install it: pip install 'endor-sparse[ray]', or use "
            "`endor pack --shard` with any scheduler"
        ) from None
    return ray


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
