"""Everything that touches transformers: network, weights, cache, hooks, what can be wrapped."""
