"""The report: one page that compares arms with a baseline over several seeds."""
