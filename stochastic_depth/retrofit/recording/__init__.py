"""Records what a block's code does in a call, on a stand-in and without noise."""
