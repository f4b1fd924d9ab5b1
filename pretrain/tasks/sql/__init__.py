"""Running queries that nobody has looked at, and comparing what they return."""
