"""Public path of :mod:`attnreuse.binding.enabling` and :mod:`attnreuse.binding.session`."""

from attnreuse.binding.enabling import disable, enable
from attnreuse.binding.session import Session, Tick

__all__ = ["Session", "Tick", "disable", "enable"]
