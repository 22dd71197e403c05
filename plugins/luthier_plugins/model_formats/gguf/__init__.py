"""GGUF files as models: converted once into a cached transformers folder."""
