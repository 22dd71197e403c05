"""Side-by-side measurements against peers. Never imported by Luthier, never part of the tests."""
