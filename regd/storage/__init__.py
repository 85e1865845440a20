"""The registry on disk: the journal, and its checkpoint `registry.json`. Blocking, so it runs in threads."""
