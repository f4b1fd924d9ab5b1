"""Databases for the queries of SQL tasks."""
