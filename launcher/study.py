"""Run a study: `launcher/study.py STUDY.yaml [key=value ...] [--dry-run]`.

The same command resumes a study that was stopped.
"""

from pathlib import Path

from pretrain.studies.main import main

if __name__ == "__main__":
    main(Path(__file__).parent)
