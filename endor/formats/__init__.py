"""Weights of other quantised formats as codes, levels and steps: one module a kind of storage."""
