"""Preparation of corpora: tokenizes the views of records and writes them to shards (`python -m data_prep CONFIG [key=value ...]`)."""
