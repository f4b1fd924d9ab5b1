"""The downstream evaluation job: export, finetune, generate, score. Finetuning is a training run of its own."""
