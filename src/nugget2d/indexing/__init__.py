"""A corpus into a store: documents, workers that compress them, and what becomes of each."""
