"""Pages, figures and tables; no measurement is known here."""
