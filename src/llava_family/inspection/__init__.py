"""Shows what a model does with its inputs, and what that costs."""
