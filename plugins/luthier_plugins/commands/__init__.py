"""The commands that are plugins, a folder each."""
