"""Luthier itself, measured through its public Python interface only."""
