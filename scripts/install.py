"""Install Endor and its development needs into the environment that runs this script.

Without options: the newest of everything. `ENDOR_TORCH` says which torch to install where none is
present; it may hold further pip options, such as the index of the CPU-only builds. When it is not
set, the newest CPU-only build that pip's indexes have is taken, else the newest torch.

With `--lowest`: the lowest versions that pyproject.toml allows, and of the development needs only
what runs the tests. A torch of the lowest version with its CUDA libraries is several gigabytes, so
torch is the same as without the option unless `ENDOR_TORCH_LOWEST` says otherwise, such as
`torch==2.8.0 --index-url https://download.pytorch.org/whl/cpu`.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
TESTING = ("gguf", "hypothesis", "pytest")
"""Development needs that the tests import; the others only look at the source."""


def pip(*arguments: str) -> None:
    """Run `pip install`; leave with its exit status when it fails."""
    # Compiling all of torch's modules takes longer than the few that are imported do.
    command = [*PIP, "install", "-q", "--no-compile", *arguments]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"pip install {' '.join(arguments)} failed; its message is above")


def newest_torch() -> str:
    """Return the requirement of the newest CPU-only torch, of any newest torch where none is."""
    found = subprocess.run(
        [*PIP, "index", "versions", "torch"], check=False, capture_output=True, text=True
    ).stdout
    builds = re.findall(r"[\w.]+\+cpu", found.partition("Available versions:")[2])
    return f"torch=={builds[0]}" if builds else "torch"


def lowest() -> Iterator[str]:
    """Yield the lowest allowed version of every requirement that the tests need, but torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hf"], *extras["plot"]]
    wanted += [item for item in extras["dev"] if item.startswith(TESTING)]
    for item in wanted:
        found = re.fullmatch(r"([\w-]+)>=([\w.]+)(?:,.*)?", item)
        if found is None:
            raise SystemExit(f"pyproject.toml: {item} has no lower bound")
        name, bound = found.groups()
        if name != "torch":
            yield f"{name}=={bound}"


def refuse_namesake() -> None:
    """Leave where another distribution called endor is installed: its module would win."""
    sys.path.insert(0, str(ROOT))
    from endor import namesake

    record = namesake.find()
    if record is not None:
        sys.exit(namesake.message(record))


def main() -> None:
    at_lowest = sys.argv[1:] == ["--lowest"]
    if importlib.util.find_spec("torch") is None:
        torch = os.environ.get("ENDOR_TORCH") or newest_torch()
        if at_lowest:
            torch = os.environ.get("ENDOR_TORCH_LOWEST", torch)
        pip(*shlex.split(torch))
    if at_lowest:
        pip(*lowest())
        pip("setuptools>=77", "wheel")
        pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))
    else:
        pip("-e", f"{ROOT}[dev]")
    refuse_namesake()


if __name__ == "__main__":
    main()
