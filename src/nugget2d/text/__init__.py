"""Tokenization, segmentation, special tokens, and the detokenizer of streamed answers."""
