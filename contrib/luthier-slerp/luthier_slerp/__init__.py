"""The merger SLERP, as a package of its own."""
