"""A census of activations over a corpus, and what rounding loses of them."""
