"""Evaluate the checkpoints of a run, export or push them, embed texts with an export, or convert an export.

launcher/evaluate.py RUN_DIR [--task NAME ...] [--checkpoint STEP|latest] [--watch] [task.test=FILE key=value ...]
launcher/evaluate.py RUN_DIR --export FOLDER [--step N]
launcher/evaluate.py RUN_DIR --push
launcher/evaluate.py EXPORT --embed FILE
launcher/evaluate.py EXPORT --sentence-transformers FOLDER
"""

from pretrain.evaluation.job import main

if __name__ == "__main__":
    main()
