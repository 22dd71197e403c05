"""The optimiser Lion, a plugin of Luthier."""
