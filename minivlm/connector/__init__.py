"""Connectors: patch features to image tokens of the decoder's width. One file per published design."""
