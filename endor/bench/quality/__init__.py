"""How good a checkpoint is on a text."""
