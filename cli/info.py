"""`endor info`: what will run on this machine, and what will not and why."""

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from endor import __version__
from endor.cli.terminal import emit, show

PACKAGES = (
    "numpy",
    "torch",
    "safetensors",
    "transformers",
    "accelerate",
    "xxhash",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuda-bindings",
    "kvikio-cu13",
    "matplotlib",
)


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info_command(as_json: bool) -> None:
    """Show versions, devices, and which kernels and readers will run."""
    facts = collect()
    if as_json:
        emit(facts, indent=2)
        return
    for section, rows in facts.items():
        show(f"{section}")
        width = max((len(key) for key in rows), default=0)
        for key, value in rows.items():
            show(f"  {key:<{width}}  {'-' if value is None else value}")


def collect() -> dict[str, dict[str, object]]:
    """Return the facts, section by section."""
    import torch

    from endor import kernels
    from endor.kernels import gpu_device

    versions: dict[str, object] = {"endor": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    devices: dict[str, object] = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    return {
        "versions": versions,
        "devices": devices,
        "CPU kernels": dict(kernels.describe()),
        "GPU kernels": dict(gpu_device.describe()),
    }
