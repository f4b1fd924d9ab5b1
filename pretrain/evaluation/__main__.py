"""`python -m pretrain.evaluation RUN_DIR`: the same as launcher/evaluate.py."""

from pretrain.evaluation.job import main

if __name__ == "__main__":
    main()
