"""Log messages of the project in tests, as lines of the console."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from data_prep.utils.console import PACKAGES, LineFormatter


class _LineHandler(logging.Handler):
    def __init__(self, receive: Callable[[str], None]):
        super().__init__()
        self._receive = receive
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self._receive(self.format(record))


@contextlib.contextmanager
def receive_messages(receive: Callable[[str], None]) -> Iterator[None]:
    """Call `receive` with each message that a command would show by default. An exception of `receive` is raised."""
    handler = _LineHandler(receive)
    loggers = [logging.getLogger(package) for package in PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
