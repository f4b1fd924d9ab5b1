"""A study: `launcher/study.py STUDY.yaml [key=value ...] [--dry-run]`. Go on with one that was stopped: the same command."""

from pathlib import Path

from pretrain.studies.main import main

if __name__ == "__main__":
    main(Path(__file__).parent)
