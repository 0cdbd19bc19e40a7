"""Try the aarch64 wheel on this machine, by qemu: no ARM machine, container or root is needed.

python scripts/try_wheel_aarch64.py dist/endor_sparse-*-manylinux_2_28_aarch64.whl

Debian's Python for arm64 is unpacked into a folder, with the numpy and torch that PyPI has for it.
There the wheel must name the NEON kernel, verify what was packed here, pack the same checkpoint
to the same files, and unpack it to the same bits. Takes about three minutes, and 6 GB in --work,
which is used again. Needs qemu-user, apt-get, dpkg and Debian's archive keyring; says what is
missing and ends with 0 where one is, or with 1 with --require.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE, PYTHON = "bookworm", "3.11"
NEEDED = ("qemu-aarch64", "apt-get", "dpkg")
ODD = "model.layers.0.mlp.up_proj.weight"
PACKINGS: dict[str, tuple[str, ...]] = {
    "lossless": (),
    "pruned": ("--prune", "magnitude"),
    "quantised": ("--bits", "3.5", "--calibration", "none", "--exclude", ODD),
}
"""What is packed on both machines, by name."""


def missing() -> list[str]:
    """Return what this machine lacks."""
    found = [name for name in NEEDED if shutil.which(name) is None]
    return found if KEYRING.is_file() else [*found, str(KEYRING)]


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command and return what it printed; leave with its message when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def fetch_python(work: Path) -> None:
    """Unpack Debian's Python for arm64, and what it needs, into `work/root`."""
    state, debs = work / "apt", work / "debs"
    for folder in ("etc/apt", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    source = f"deb [arch=arm64 signed-by={KEYRING}] {MIRROR} {SUITE} main\n"
    (state / "etc/apt/sources.list").write_text(source)
    settings = state / "apt.conf"
    settings.write_text(
        f'Dir "{state}";\nDir::State::status "{state / "status"}";\n'
        f'Dir::Cache::archives "{debs}";\nDebug::NoLocking "true";\n'
        'APT::Architecture "arm64";\nAPT::Architectures {"arm64";};\n'
    )
    (debs / "partial").mkdir(parents=True, exist_ok=True)
    run("apt-get", "update", "-qq", APT_CONFIG=str(settings))
    packages = (f"python{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libstdc++6")
    options = ("-qq", "-y", "--no-install-recommends", "--download-only")
    run("apt-get", "install", *options, *packages, APT_CONFIG=str(settings))
    for package in sorted(debs.glob("*.deb")):
        run("dpkg", "-x", package, work / "root")


def fetch_libraries(work: Path) -> None:
    """Install what Endor needs, as PyPI has it for aarch64, into `work/site`."""
    # what a loop over older tags would find: a wheel names the oldest glibc that it runs on
    tags = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 17)]
    names = ("numpy", "xxhash", "safetensors", "tqdm", "click>=8.4.2", "torch>=2.8")
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", work / "site"),
        *(*tags, "--platform=manylinux2014_aarch64", "--platform=any", "--only-binary=:all:"),
        *(f"--python-version={PYTHON}", "--implementation=cp", *names),
    )


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint of every kind of value that a bit can be lost in."""
    torch.manual_seed(0)
    layers = {
        f"model.layers.{at}.mlp.{name}.weight": torch.randn(96, 160).to(dtype)
        for at, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32))
        for name in ("up_proj", "down_proj")
    }
    odd = layers[ODD].view(torch.int16)
    odd[0, :4] = torch.tensor([-0x8000, 0x7F80, 0x7FC1, 1], dtype=torch.int16)  # -0, inf, nan
    folder.mkdir()
    save_file(layers, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def try_wheel(wheel: Path, work: Path) -> None:
    """Run the wheel's commands by qemu; leave where one differs from this machine's own."""
    if not (work / "root" / "usr" / "bin" / f"python{PYTHON}").exists():
        fetch_python(work)
    if not (work / "site" / "torch").exists():
        fetch_libraries(work)
    with tempfile.TemporaryDirectory(prefix="endor-aarch64-") as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel")
        python = work / "root" / "usr" / "bin" / f"python{PYTHON}"
        environment = {
            "PYTHONPATH": f"{folder / 'wheel'}:{work / 'site'}",
            "PYTHONHOME": str(work / "root" / "usr"),
            "QEMU_LD_PREFIX": str(work / "root"),
        }

        def there(*words: str | Path) -> str:
            # in a clone, Python would find that and not the wheel
            return run("qemu-aarch64", python, "-m", "endor", *words, cwd=folder, **environment)

        def here(*words: str | Path) -> str:
            return run(sys.executable, "-m", "endor", *words, cwd=folder)

        found = json.loads(there("info", "--json"))
        if found["CPU kernels"]["kernel"] != "neon":
            sys.exit(f"the wheel runs without its NEON kernel: {found}")
        print(
            f"info: kernel {found['CPU kernels']['kernel']}, of {found['CPU kernels']['library']}"
        )
        source = folder / "source"
        make_checkpoint(source)
        for what, options in PACKINGS.items():
            ours, theirs = folder / f"{what}-here", folder / f"{what}-there"
            here("pack", source, ours, *options)
            there("verify", ours)
            there("pack", source, theirs, *options)
            here("unpack", ours, folder / f"{what}-unpacked-here")
            there("unpack", ours, folder / f"{what}-unpacked-there")
            for one, other in (
                (ours, theirs),
                (folder / f"{what}-unpacked-here", folder / f"{what}-unpacked-there"),
            ):
                if hashes(one) != hashes(other):
                    sys.exit(f"{what}: {one.name} and {other.name} differ")
            print(f"{what}: verified; packed to the same files; unpacked to the same bits")


def main() -> None:
    parser = argparse.ArgumentParser(description="Try the aarch64 wheel by qemu.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".aarch64"), help="what is fetched")
    parser.add_argument("--require", action="store_true", help="fail where it cannot be tried")
    options = parser.parse_args()
    lacking = missing()
    if lacking:
        print(f"{options.wheel.name}: not tried here: {', '.join(lacking)} missing")
        sys.exit(1 if options.require else 0)
    if not options.wheel.name.endswith("_aarch64.whl"):
        parser.error(f"{options.wheel}: must be a wheel for aarch64")
    options.work.mkdir(parents=True, exist_ok=True)
    try_wheel(options.wheel, options.work.resolve())


if __name__ == "__main__":
    main()
