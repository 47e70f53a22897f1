"""Answers with and without the mask, side by side."""
