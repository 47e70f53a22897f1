"""Benchmarks with and without a mask, item by item."""
