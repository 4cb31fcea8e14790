"""The server: the engine that owns the model, and the HTTP interfaces before it."""
