"""Arrays only; no model is known here."""
