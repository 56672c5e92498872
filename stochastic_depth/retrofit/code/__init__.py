"""What a block's code is, what it reads and changes besides its arguments, and what makes two calls the same."""
