"""What is measured on a plain model, a folder a measurement."""
