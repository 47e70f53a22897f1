"""Masks of every size compared."""
