"""Training: a job is built from a config, one loop runs it."""
