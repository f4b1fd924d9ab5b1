"""Inspection of data that nobody has described yet: splits, columns, languages, lengths, and the likely views."""
