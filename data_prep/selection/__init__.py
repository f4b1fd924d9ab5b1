"""Selection of the records that a corpus keeps."""
