"""Proves rewritten code, and runs it in place of the block's own."""
