"""What quantised activations cost, and how much of it the massive token is to blame for."""
