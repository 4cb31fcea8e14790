"""The server: HTTP in front of one engine that owns the model."""
