"""One thread at a time: what a session tells the layers before a denoiser call holds for that call alone."""

from __future__ import annotations

import sys
import threading
from typing import Any

from attnreuse.errors import AttnReuseError


class ThreadGuard:
    """Lets one thread at a time into a denoiser; threads may take turns from call to call."""

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._busy: int | None = None  # the thread inside

    def enter(self, denoiser: Any) -> None:
        """Raises :class:`AttnReuseError` while another thread is inside."""
        me = threading.get_ident()
        with self._door:
            alive = sys._current_frames()  # a thread that died inside has left
            if self._busy in alive and self._busy != me:
                raise AttnReuseError(
                    f"thread {me} calls the {type(denoiser).__name__} that thread {self._busy} is inside of: pipelines "
                    "that share a denoiser must take turns (a lock around their calls), or have a copy each "
                    "(copy.deepcopy), each enabled for itself"
                )
            self._busy = me

    def inside(self) -> bool:
        """Whether this thread is."""
        return self._busy == threading.get_ident()

    def leave(self) -> None:
        """This thread is no longer inside."""
        if self.inside():
            self._busy = None
