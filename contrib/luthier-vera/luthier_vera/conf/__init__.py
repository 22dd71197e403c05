"""Presets, on Hydra's search path while the package is installed."""
