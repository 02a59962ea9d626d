"""The CUDA staging path."""
