"""Model families and the decoder that runs them."""
