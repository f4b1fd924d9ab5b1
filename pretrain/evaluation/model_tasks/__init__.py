"""Tasks that look into the model: `NAME.py` has `evaluate`, a function from a CheckpointTask to a TaskResult. Their options are in pretrain/tasks."""
