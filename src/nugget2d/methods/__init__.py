"""Compression methods, and their registry."""
