"""After training: evaluate, analyze, cut and export a network."""
