"""Comparing the base LM with the mixture over the same tokens."""
