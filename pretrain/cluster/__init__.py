"""What is asked of the nodes before a run: an agent on each of them, and the checks of what the agents find."""
