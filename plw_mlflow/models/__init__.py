"""Language models: what is loaded, what is trained in them, and what is written of them."""
