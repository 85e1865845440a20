"""gunicorn's settings for test_servers: each worker is a holder of the one registration."""

from typing import Any

from regd_client import blocking

bind = "127.0.0.1:0"
loglevel = "warning"


def post_worker_init(worker: Any) -> None:
    if worker.alive:  # else it was told to end while it was starting
        blocking.serving("web", worker.sockets[0].getsockname()[1])
