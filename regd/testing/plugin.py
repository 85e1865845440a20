"""The pytest plugin that comes with the package. It is loaded by every pytest here, so it imports nothing dear."""
