"""Keys and values in RAM or on disk: where they are, and what moves them."""
