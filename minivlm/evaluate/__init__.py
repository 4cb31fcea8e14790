"""Evaluation of the shipped checkpoint on held-out pictures."""
