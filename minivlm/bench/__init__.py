"""How fast the model runs, beside its physical limit and beside transformers: `minivlm bench`."""
