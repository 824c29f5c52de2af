"""Other memories than nuggets, trained and measured by the same code; only how they are encoded differs."""
