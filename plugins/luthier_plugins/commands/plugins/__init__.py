"""The command `plugins`: what is installed, and a package to start a method from."""
