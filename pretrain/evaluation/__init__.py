"""The downstream evaluation job: export, finetune, generate, score. Finetuning is a separate training run."""
