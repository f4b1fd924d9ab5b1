"""Checks of a run's nodes before it starts: agents on the nodes collect facts, and checks turn them into findings."""
