"""The path from shards to batches: corpus, order, layout, packing and batch, independent of models and DeepSpeed."""
