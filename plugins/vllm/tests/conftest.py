"""The plugin is importable beside the checkout; what needs vLLM itself says so and is skipped."""

import sys
from pathlib import Path

PLUGIN = Path(__file__).resolve().parent.parent
if str(PLUGIN) not in sys.path:
    sys.path[:0] = [str(PLUGIN), str(Path(__file__).parent)]
