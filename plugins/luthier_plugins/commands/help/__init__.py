"""The command `help`: what there is to run, and with which options."""
