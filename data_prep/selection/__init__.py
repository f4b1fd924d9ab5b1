"""Which records a corpus keeps."""
