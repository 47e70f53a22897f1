"""Why the massive activation is there."""
