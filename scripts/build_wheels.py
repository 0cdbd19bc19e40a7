"""Build the source distribution and a wheel per machine, and check what they ask of a system.

python scripts/build_wheels.py                   sdist, and a wheel for each machine with a compiler
python scripts/build_wheels.py --machine x86_64  only that machine
python scripts/build_wheels.py --try PYTHON ...  also install the wheel for this machine in a fresh
                                                 environment of each, and round-trip a tensor there

Wheels are built from the sdist, so that it is proved complete. They are tagged
py3-none-manylinux_2_28_MACHINE: the library is plain C, loaded by ctypes, and serves every Python.
Needs `build`, and `gcc` or the machine's cross compiler (`apt install gcc-aarch64-linux-gnu`).
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (2, 28)
COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0"} | {
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
"""What a manylinux library may ask for, of what the kernels could need."""

SMOKE = """
import numpy as np
from endor import codecs, kernels
from endor.kernels import native
assert native.available(), native.load()
bits = np.arange(100_000, dtype=np.uint16) * np.uint16(3) % 977
bits[::2] = 0
packed = kernels.encode(bits, codecs.dtype("BF16"))
out = np.empty_like(bits)
kernels.decode(packed, out)
assert np.array_equal(out, bits)
print("kernels", *native.available(), "of", native.load()[1])
"""


def run(*command: str | Path, **options: Any) -> str:
    """Run a command and return what it said; leave with its message when it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}:\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def compiler(machine: str) -> str | None:
    """Return the compiler that makes code for `machine`, or None."""
    native = machine == platform.machine()
    return shutil.which("gcc" if native else COMPILERS[machine])


def build_wheel(sdist: Path, machine: str, out: Path) -> Path:
    """Build the wheel of `machine` from the sdist; return it."""
    command = compiler(machine)
    with tempfile.TemporaryDirectory(prefix="endor-wheel-") as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        # its own link command: that of this Python may hold folders of this machine
        environment = os.environ | {
            "CC": command,
            "LDSHARED": f"{command} -shared -Wl,-s",
            "CFLAGS": "-g0",
        }
        tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
        option = f"--config-setting=--build-option=--plat-name={tag}"
        run(
            *(sys.executable, "-m", "build", "--wheel", option, "--outdir", folder, source),
            env=environment,
        )
        (built,) = Path(folder).glob("*.whl")
        return Path(shutil.copy2(built, out))


def problems(wheel: Path, machine: str) -> list[str]:
    """Return what is wrong with a wheel."""
    found = []
    if not wheel.name.endswith(f"-py3-none-manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}.whl"):
        found.append(f"its tag is not for every Python on {machine}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith(".so")]
        if libraries != ["endor/kernels/_native.so"]:
            return [*found, f"it must hold one library, _native.so, got {libraries}"]
        for needed in ("endor/cli/main.py", "endor/cuda/common.cuh", "endor/py.typed"):
            if needed not in names:
                found.append(f"{needed} is missing")
        library = archive.extract(libraries[0], folder)
        found += library_problems(Path(library), machine)
    return found


def library_problems(library: Path, machine: str) -> list[str]:
    """Return what a shared library asks for that a manylinux system need not have."""
    found = []
    number = int.from_bytes(library.read_bytes()[18:20], "little")
    if number != ELF_MACHINES[machine]:
        found.append(f"{library.name} is for ELF machine {number}, not {machine}")
    text = run("readelf", "--wide", "--dynamic", "--version-info", library)
    found += [
        f"it needs {name}, which a system may lack"
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", text)
        if name not in LIBRARIES
    ]
    found += [f"it looks in {path}" for path in re.findall(r"\(R(?:UN)?PATH\).*\[(.+)\]", text)]
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", text)}
    if not versions:
        found.append("no version of glibc found: is it stripped of them, or of another C library?")
    found += [
        f"it needs glibc {'.'.join(map(str, version))}, beyond {GLIBC[0]}.{GLIBC[1]}"
        for version in sorted(versions)
        if version > GLIBC
    ]
    return found


def try_wheel(wheel: Path, python: str) -> str:
    """Install a wheel in a fresh environment, without a compiler; return what it said."""
    with tempfile.TemporaryDirectory(prefix="endor-try-") as folder:
        run(python, "-m", "venv", folder)
        installed = Path(folder, "bin", "python")
        pip = (installed, "-m", "pip", "install", "-q", "--no-compile")
        environment = os.environ | {"CC": "/nonexistent"}
        # torch takes minutes and gigabytes, and the arrays' side needs none
        run(*pip, "numpy", "xxhash", "safetensors", "tqdm", "click>=8.4.2", env=environment)
        run(*pip, "--no-deps", "--no-index", wheel, env=environment)
        said = run(installed, "-c", SMOKE, cwd=folder)
        version = run(installed, "-m", "endor", "--version", cwd=folder)
        python_version = run(installed, "-c", "import platform; print(platform.python_version())")
        return f"Python {python_version.strip()}: {version.strip()}; {said.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sdist and the wheels.")
    parser.add_argument("--machine", choices=COMPILERS, action="append")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--try", dest="pythons", nargs="+", default=[], metavar="PYTHON")
    options = parser.parse_args()
    machines = options.machine or [name for name in COMPILERS if compiler(name)]
    for machine in machines:
        if compiler(machine) is None:
            sys.exit(f"{machine}: no compiler {COMPILERS[machine]}; install it")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="endor-sdist-") as folder:
        run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
        (made,) = Path(folder).glob("*.tar.gz")
        sdist = Path(shutil.copy2(made, options.out))
    print(sdist)
    for machine in machines:
        wheel = build_wheel(sdist, machine, options.out)
        found = problems(wheel, machine)
        if found:
            wheel.unlink()
            sys.exit("\n".join(f"{wheel.name}: {line}" for line in found))
        print(f"{wheel}: {wheel.stat().st_size} bytes")
        if machine == platform.machine():
            for python in options.pythons:
                print(try_wheel(wheel, python))


if __name__ == "__main__":
    main()
