"""What users call: the engine, caches, configuration."""
