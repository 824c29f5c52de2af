"""Text in, text out: tokens, segments, and the detokenizer of streamed answers."""
