"""Nugget2D: the trained method, cut into segments, states of chosen tokens."""
