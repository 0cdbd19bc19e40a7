"""Install Endor and its development needs into the environment that runs this script.

`ENDOR_TORCH` (default `torch==2.13.0`) says which torch to install where none is present; it may
hold further pip options, such as the index of the CPU-only builds.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TORCH = "torch==2.13.0"


def pip(*arguments: str) -> None:
    """Run `pip install`; leave with its exit status when it fails."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    status = subprocess.run([*command, *arguments], check=False).returncode
    if status:
        sys.exit(f"pip install {' '.join(arguments)} failed; its message is above")


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        pip(*shlex.split(os.environ.get("ENDOR_TORCH", DEFAULT_TORCH)))
    pip("-e", f"{ROOT}[dev]")


if __name__ == "__main__":
    main()
