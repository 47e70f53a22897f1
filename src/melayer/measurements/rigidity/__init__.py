"""What the massive activation makes rigid."""
