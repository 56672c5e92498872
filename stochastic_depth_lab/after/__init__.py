"""What is done with a trained network: evaluate, analyze, cut, export."""
