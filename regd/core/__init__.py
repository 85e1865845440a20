"""The decisions of the registry. No asyncio, clock, socket, file, JSON or logger in here.

Time and randomness come in as arguments; values come out: entries, changes, refusals.
"""
