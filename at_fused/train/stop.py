"""Ctrl-C and SIGTERM: the step is finished, the state saved, and the program ends."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal has ended the run; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # As shells have it for Ctrl-C; whoever sends SIGTERM got what was asked for.
        self.status = 130 if number == signal.SIGINT else 0


class Signals:
    """While open, the first signal is noted in ``number``; the second acts as it always does."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
