"""The page of `llava-family demo`: a conversation about images, beside it what the model does with them."""
