"""Image encoders: tiles to patch features. One file per published encoder."""
