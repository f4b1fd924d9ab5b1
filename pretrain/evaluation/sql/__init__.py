"""Databases for the queries of a task."""
