"""Doors to the operating system: listening sockets, peer credentials, processes, probes, service manager, clock.

Each module wraps one facility of the system. None of them knows connections, requests or the registry.
"""
