"""Running queries that nobody has looked at, comparing what they give, and making databases for them."""
