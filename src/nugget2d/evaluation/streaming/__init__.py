"""Language modelling with bounded memory: several ways to read a long text when no query sees more than S states."""
