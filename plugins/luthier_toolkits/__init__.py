"""What several methods, or a method of a stranger, share."""
