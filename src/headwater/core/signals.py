"""Stopping politely: the current step ends, a checkpoint is written, and the process says which signal it was."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "StopSignals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # it is a request that was honoured, not an error
    """Training stopped at a signal after writing a checkpoint; the same call continues it.

    Attributes:
        signum: the signal; a command exits with ``128 + signum`` (143 for SIGTERM, 130 for Ctrl-C).
        step: of the checkpoint.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; run the same command to continue.")
        self.signum = signum
        self.step = step


class StopSignals:
    """Context in which SIGTERM and SIGINT are noted in ``signum`` (0: none yet); a second SIGINT interrupts at once.

    Handlers can only be set in the main thread; elsewhere signals keep their effect.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[signal.Signals, Any] = {}  # Any: what signal.signal returns

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
