"""The logger `regd_client`. What it reports happens whether or not it can be written."""

import logging
from typing import Any

_logger = logging.getLogger("regd_client")
_CALLER = 3  # frames up: the method here, `_write`, and who calls


class Log:
    """Write to the logger, and ignore a handler that raises, or a stderr that is closed.

    A name is withdrawn and a registration is kept in the same functions that log it.
    """

    def info(self, message: str, *values: object) -> None:
        self._write(logging.INFO, message, values)

    def warning(self, message: str, *values: object) -> None:
        self._write(logging.WARNING, message, values)

    def error(self, message: str, *values: object, exc_info: BaseException | None = None) -> None:
        self._write(logging.ERROR, message, values, exc_info=exc_info)

    def _write(self, level: int, message: str, values: tuple[object, ...], **more: Any) -> None:
        try:
            _logger.log(level, message, *values, stacklevel=_CALLER, **more)
        except Exception:  # a handler's own, or a closed stderr: not for who registers a service
            return


log = Log()
