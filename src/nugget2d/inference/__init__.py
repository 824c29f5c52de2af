"""Inference with memories: prefix, generation, scoring, reconstruction, sampling."""
