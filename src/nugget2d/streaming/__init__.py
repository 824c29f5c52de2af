"""Autoregressive mode: recent tokens uncompressed, everything older as nuggets (Nugget2D, section 3.3)."""
