"""The pytest plugin that comes with the package. Every pytest here loads it, so it imports nothing dear."""
