"""gunicorn's settings for test_servers. The master process registers the name, as in client/SERVERS.md."""

from typing import Any

from regd_client import blocking

bind = "127.0.0.1:0"
loglevel = "warning"


def when_ready(server: Any) -> None:
    blocking.register_process("web", server.LISTENERS[0].getsockname()[1])
