"""Memories: payload, provenance, file format."""
