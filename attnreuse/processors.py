"""Public path of :mod:`attnreuse.binding.processors`."""

from attnreuse.binding.processors import *  # noqa: F403
