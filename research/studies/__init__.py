"""Controlled training experiments: one recipe, changed in one way at a time."""
