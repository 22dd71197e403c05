"""Every built-in method, one file each, registered through the same hooks as a stranger's."""
