"""What the task text is made of: a text on disk, its tokens, and windows of them."""
