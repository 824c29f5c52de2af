"""Training from a recipe: a small LM from scratch, and the compressor on top of a base."""
