"""Show the state of runs: `launcher/status.py [RUN|FOLDER ...] [--watch]`."""

from pretrain.status import main

if __name__ == "__main__":
    main()
