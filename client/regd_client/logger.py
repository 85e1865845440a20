"""The logger `regd_client`. Errors of the program's log handlers are ignored."""

import contextlib
import logging
from typing import Any

__all__ = ["log"]


class _SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """Ignores exceptions of handlers, so that logging never interrupts registering or withdrawing a name."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        with contextlib.suppress(Exception):
            super().log(level, msg, *args, stacklevel=2, **kwargs)  # 2: the caller's line, not this one


log = _SafeLogger(logging.getLogger("regd_client"), {})
