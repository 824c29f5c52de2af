"""Language modelling with bounded memory: methods to read long texts with at most S states per query."""
