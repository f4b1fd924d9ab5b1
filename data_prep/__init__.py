"""Preparation of corpora: converts text to paired-view token shards (`python -m data_prep CONFIG [key=value ...]`)."""
