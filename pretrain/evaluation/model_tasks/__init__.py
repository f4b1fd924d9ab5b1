"""Tasks that need the model itself: `evaluate` in `NAME.py` returns the TaskResult of a CheckpointTask.

Their options are in pretrain/tasks.
"""
