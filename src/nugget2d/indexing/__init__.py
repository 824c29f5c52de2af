"""Indexing: compresses the documents of a corpus into a store, with parallel workers."""
