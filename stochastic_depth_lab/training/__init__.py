"""Training: from an experiment to the last epoch, one run or many."""
