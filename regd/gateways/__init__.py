"""`regctl serve`: the registry over HTTP and DNS, read-only, from a process of its own (the extra `serve`)."""
