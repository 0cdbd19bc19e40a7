"""The tiny models of the pruning tests."""

import importlib.util
from pathlib import Path

_at = Path(__file__).parents[1] / "pruning" / "conftest.py"
_spec = importlib.util.spec_from_file_location("pruning_fixtures", _at)
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)

save, text = _fixtures.save, _fixtures.text
