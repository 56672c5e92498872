"""Finds the branches of a model before it runs."""
