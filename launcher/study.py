"""Run a study: `launcher/study.py STUDY.yaml [key=value ...] [--dry-run]`.

The same command resumes a study that was stopped.
"""

from pathlib import Path

from pretrain.studies.main import main as run_study


def main() -> None:
    """Run a study with the commands of this folder."""
    run_study(Path(__file__).parent)


if __name__ == "__main__":
    main()
