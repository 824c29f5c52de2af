"""A memory in front of a prompt: reconstruct, continue, score, sample."""
