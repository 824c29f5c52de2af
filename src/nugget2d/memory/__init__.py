"""What a context becomes: payload, provenance, file."""
