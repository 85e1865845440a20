"""Bytes to messages and back. No asyncio, clock, socket, logger or registry in here, and nothing of storage."""
