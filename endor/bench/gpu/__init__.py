"""Kernels, link and whole models on a CUDA device."""
