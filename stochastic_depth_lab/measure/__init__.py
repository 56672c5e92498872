"""Measures what skipping saves, on this machine or in a published model, without a run."""
