"""Check that the tag, the package, CITATION.cff and the changelog name one version.

python scripts/release_version.py v0.2.0    exit 1, and say why, unless all four agree, the version
                                            has a date, and nothing is left under Unreleased
python scripts/release_version.py           that the three agree; between releases
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """Return the version that the package says, without importing it."""
    text = (ROOT / "endor" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("endor/version.py says no version")
    return found[1]


def problems(tag: str | None) -> list[str]:
    """Return what disagrees."""
    own = version()
    found = []
    if tag is not None and tag != f"v{own}":
        found.append(f"the tag is {tag}, the package says {own}: tag v{own}, or raise __version__")
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if cited is None or cited[1] != own:
        found.append(f"CITATION.cff must say version: {own}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"\n## [{own}]" not in changelog:
        found.append(f"CHANGELOG.md has no section [{own}]")
    elif tag is not None:
        if not re.search(
            rf"^## \[{re.escape(own)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE
        ):
            found.append(f"CHANGELOG.md must give the day of [{own}], as ## [{own}] - YYYY-MM-DD")
        _, _, waiting = changelog.partition("\n## [Unreleased]")
        if re.search(r"^- ", waiting.partition("\n## [")[0], re.MULTILINE):
            found.append(f"CHANGELOG.md has lines under [Unreleased]: move them to [{own}]")
    return found


if __name__ == "__main__":
    disagreements = problems(sys.argv[1] if len(sys.argv) > 1 else None)
    print("\n".join(disagreements) or version())
    sys.exit(1 if disagreements else 0)
