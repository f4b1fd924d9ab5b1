"""Entry point of `python -m pretrain.evaluation RUN_DIR`, which is equivalent to launcher/evaluate.py."""

from pretrain.evaluation.job import main

if __name__ == "__main__":
    main()
