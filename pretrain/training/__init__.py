"""The training loop on DeepSpeed ZeRO-3. No other package depends on DeepSpeed."""
