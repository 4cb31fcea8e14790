"""Decoders: embeddings to hidden states to logits. One file serves every brand with the same equations."""
