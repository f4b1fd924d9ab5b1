"""`python -m pretrain.training CONFIG`: the same as launcher/run.py."""

from pretrain.training.main import main

if __name__ == "__main__":
    main()
