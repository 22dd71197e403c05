"""The adapter VeRA, a plugin of Luthier."""
