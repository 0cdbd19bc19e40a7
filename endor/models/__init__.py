"""A transformers model without weights: which stored tensors make which of its parameters."""
