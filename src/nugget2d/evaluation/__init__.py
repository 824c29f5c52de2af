"""Measuring what memories keep."""
