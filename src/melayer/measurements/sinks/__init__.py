"""What attention the massive tokens draw."""
