"""The command that writes a first configuration for the data of a user."""
