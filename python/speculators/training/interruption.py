"""Ctrl-C and the scheduler's SIGTERM: a run ends after the update it is in, with a checkpoint.

In the middle of an update the weights are of no number of updates, and no checkpoint could be made
of them. So the first signal is noted and asked about; a second one interrupts at once.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, says whether the run is to end; in other threads than the main one not.

    Attributes:
        signal: the first signal that came; None as long as none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_noted(self) -> None:
        """Ends the run as the signal would have ended it.

        Raises:
            KeyboardInterrupt: it was SIGINT.
            SystemExit: it was SIGTERM; the status is 128 plus the signal's number, as shells say.
        """
        if self.signal is not None:
            _interrupt(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            _interrupt(number)
        self.signal = number


def _interrupt(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
