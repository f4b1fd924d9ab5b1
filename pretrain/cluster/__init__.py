"""Checks of a run's nodes before it starts: an agent on each node collects facts, and checks turn them into findings."""
