"""Training of one run or many, from an experiment to the last epoch."""
