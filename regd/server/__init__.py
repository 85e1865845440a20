"""The running daemon: connections, tasks, the engine that commits writes."""
