"""Language models from transformers, with a visibility mask and a predictor embedding."""
