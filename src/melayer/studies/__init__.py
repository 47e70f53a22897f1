"""Several measurements at once."""
