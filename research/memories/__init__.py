"""Memories to compare nuggets with; they are trained by studies and cannot be saved."""
