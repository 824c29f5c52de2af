"""Ways to compress a context; the registry names them."""
