"""From shards to batches: corpus, order, layout, packing, batch. Knows nothing of models or DeepSpeed."""
