"""What skipping saves, without a run: on this machine, in a published model."""
