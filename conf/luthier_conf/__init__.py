"""Hydra configs: one primary config a verb, and presets by group. Values only."""
