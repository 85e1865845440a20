"""The wire format: bytes to requests, and results to bytes. Without sockets, so that tests need none."""
