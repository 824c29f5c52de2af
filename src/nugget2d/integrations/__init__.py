"""Integrations with transformers and lm-evaluation-harness; each is active after its `register` is called."""
