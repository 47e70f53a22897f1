"""Texts, rows of tokens, and corpora."""
