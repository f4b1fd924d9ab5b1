"""The training loop on DeepSpeed ZeRO-3. The only package that knows DeepSpeed."""
