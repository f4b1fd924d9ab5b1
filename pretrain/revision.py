"""Which code this is. Light: needs nothing beyond Python itself."""

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_prep", "pretrain", "launcher")


def revision() -> str | None:
    """The commit of the project, with `-dirty` where files differ from it; of a container image, which has no history, what it was built from."""
    if not (ROOT / ".git").exists():
        return os.environ.get("JEPA_REVISION") or None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def source_hashes() -> dict[str, str]:
    """The beginning of the SHA-256 of each of the project's Python files, by its path in the project."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}
