"""Wrappers of the operating system: sockets, peer credentials, processes, probes, systemd and the clock.

Each module wraps one facility. None of them depends on connections, requests or the registry.
"""
