"""Pretraining of language models with a JEPA term: data, models, objectives, training and evaluation."""
