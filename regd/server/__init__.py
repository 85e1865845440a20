"""What runs: clock, sockets, tasks, signals. The first floor that may import asyncio."""
