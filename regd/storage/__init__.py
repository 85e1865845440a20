"""Entries to `registry.json` and back. No asyncio in here, and nothing of the protocol."""
