"""Language models from transformers, and one that it lacks, with a visibility mask and a predictor embedding."""
