"""Formats that models come in besides safetensors."""
