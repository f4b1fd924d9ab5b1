"""Language models from transformers, and OpenELM, with a visibility mask and a predictor embedding."""
