"""What people look at a prepared corpus with."""
