"""Measurements, as functions that return records; nothing here prints."""
