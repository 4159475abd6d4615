"""Quantization on plain arrays: nothing here knows a model or a graph."""
