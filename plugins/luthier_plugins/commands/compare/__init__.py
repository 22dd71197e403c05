"""Runs compared: the table that ends a multirun."""
