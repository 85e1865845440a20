"""Bytes to messages and back. No asyncio, clock, socket, logger, registry or storage in here."""
