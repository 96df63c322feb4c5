"""Logging: past-tense events with their data in keys; coloured on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Self

import structlog
from opentelemetry import trace

LOG_BYTES_MAX: Final = 16 * 1024 * 1024

log = structlog.get_logger(__name__)


def configure(process: str, level: str, style: str, write: Callable[[str], None] | None = None) -> None:
    """`style`: auto, console or json; `write` takes each line, standard error without it.

    An unknown level is a ValueError.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r}: debug, info, warning or error")
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_factory(write) if write else structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(scope=process)


class _Lines:
    """What structlog hands its lines to."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = write


def _factory(write: Callable[[str], None]) -> Callable[..., _Lines]:
    return lambda *_: _Lines(write)


class LogFile:
    """A log file that starts anew when it is too large; a disk that is full loses lines, not the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._lost = False

    def __enter__(self) -> Self:
        return self

    def write_text(self, line: str) -> None:
        self.write(line.encode(errors="replace"))

    def write(self, line: bytes) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            elif self._file.tell() > LOG_BYTES_MAX:
                self._close()
                self._path.replace(self._path.with_suffix(".old"))
                self._file = self._open()
            self._file.write(line + b"\n")
            self._lost = False
        except OSError as error:
            if not self._lost:
                self._lost = True
                log.error("log_lines_lost", path=str(self._path), error=error.strerror)

    def _open(self) -> IO[bytes]:
        """Without a buffer: what a full disk does not take is not kept for later."""
        return self._path.open("ab", buffering=0)

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        except OSError:
            log.debug("log_not_closed", path=str(self._path))


def _add_trace(
    _: structlog.types.WrappedLogger, __: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event
