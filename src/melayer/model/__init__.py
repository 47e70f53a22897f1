"""One view of a decoder, and what runs and watches it."""
