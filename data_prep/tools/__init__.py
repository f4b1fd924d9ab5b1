"""Tools to inspect and verify a prepared corpus."""
