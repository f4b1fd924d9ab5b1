"""Shared utilities of all commands: console, atomic files, configuration files, launchers, ragged arrays."""
