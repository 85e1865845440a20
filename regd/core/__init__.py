"""The ground floor: what the registry decides. No asyncio, clock, socket, file, JSON or logger in here.

Time and chance come in as arguments; what comes out are values: entries, changes, refusals.
"""
