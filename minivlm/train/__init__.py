"""Training: a drawn world, LLaVA's stages, resumable runs."""
