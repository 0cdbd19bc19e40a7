"""Whole models generating, each system in a process of its own."""
