"""Row filters, one file each."""
