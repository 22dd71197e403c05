"""What a merge will do, checked before anything is written."""
