"""Models on disk and on the hub: finding, loading, saving, cards."""
