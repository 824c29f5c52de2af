"""Method nugget2d: states of selected tokens from a trained encoder, segment by segment."""
