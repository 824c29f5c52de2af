"""Evaluation of memories: reconstruction, continuation, cost."""
