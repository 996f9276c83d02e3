"""The run folder on disk; nothing here needs torch."""
