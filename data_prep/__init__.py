"""Preparation of corpora: tokenizes records and writes shards (`python -m data_prep CONFIG [key=value ...]`)."""
