"""Builds datastores: corpus -> tokens -> keys and values -> index -> manifest."""
