"""stowax: JAX models in less memory."""
