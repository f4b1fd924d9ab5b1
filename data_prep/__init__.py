"""Corpora in, paired-view token shards out: `python -m data_prep CONFIG [key=value ...]`."""
