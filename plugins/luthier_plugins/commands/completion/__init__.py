"""The command `completion`: what a shell completes of luthier's command lines."""
