"""An OpenAI-compatible HTTP server that reads stored memories: one engine thread under an asynchronous front."""
