"""The kinds of checkpoints that can be read: one class a format, one contract."""
