"""Report on runs: `launcher/report.py RUN_DIR|STUDY ... [--baseline ARM] [--metric TASK/NAME] [--output FOLDER]`."""

from pretrain.report.main import main

if __name__ == "__main__":
    main()
