"""What a session says of what does not go as the policy says."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from attnreuse.errors import AttnReuseError


@dataclass(frozen=True)
class Notices:
    """Warnings; errors instead, where `strict` and something does not go as the policy says."""

    strict: bool

    def object(self, error: AttnReuseError, more: str = "") -> None:
        """Something does not go as the policy says: an error under `strict`, else a warning, which says `more`."""
        if self.strict:
            raise error
        self.warn(f"{error}{more}")

    def warn(self, message: str) -> None:
        """Say so, whatever `strict` is."""
        warnings.warn(f"attnreuse: {message}", stacklevel=2)
