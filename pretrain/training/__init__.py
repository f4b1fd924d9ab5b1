"""The training loop on DeepSpeed ZeRO-3. Only this package and pretrain.planning depend on DeepSpeed."""
