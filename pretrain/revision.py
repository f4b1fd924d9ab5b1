"""The version of the project's code. This module uses the standard library only, so it is cheap to import."""

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_prep", "pretrain", "launcher")


def revision() -> str | None:
    """Return the commit of the project, with `-dirty` appended if files differ from that commit; None if unknown.

    A container image has no git history; in a container, return the revision that the image was built from.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("JEPA_REVISION") or None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def source_hashes() -> dict[str, str]:
    """Return the first 12 hex digits of the SHA-256 of each Python file of the project, keyed by path."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}
