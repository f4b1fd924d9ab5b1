"""Commands that use a trained model: generation and search."""
