"""The logger `regd_client`. A handler that fails does not disturb what is logged."""

import logging
from typing import Any

__all__ = ["log"]

_logger = logging.getLogger("regd_client")
_CALLER = 3  # stack level of the caller: `_write`, the method, the caller


class _Log:
    """Write to the logger, and ignore a handler that raises, or a stderr that is closed.

    The functions that register and withdraw names also log, and must do their work in any case.
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
        except Exception:  # raised by a handler of the program
            return


log = _Log()
