"""A name becomes a model; knows no mask."""
