"""The objective CPO, a plugin of Luthier."""
