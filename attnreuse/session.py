"""Public path of :mod:`attnreuse.binding.enabling` and :mod:`attnreuse.binding.session`."""

from attnreuse.binding.enabling import disable, enable
from attnreuse.binding.run import Tick
from attnreuse.binding.session import Session

__all__ = ["Session", "Tick", "disable", "enable"]
