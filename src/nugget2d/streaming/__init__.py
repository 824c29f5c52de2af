"""Autoregressive mode: recent tokens whole, everything older as nuggets (Nugget2D, section 3.3)."""
