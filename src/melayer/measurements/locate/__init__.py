"""Where the massive activation emerges."""
