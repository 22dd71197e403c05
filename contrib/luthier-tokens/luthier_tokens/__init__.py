"""A command that counts tokens."""
