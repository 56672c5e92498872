"""Finds the branches in a recording, and puts each of them behind its gate."""
