"""Public path of :mod:`attnreuse.binding.session`."""

from attnreuse.binding.session import *  # noqa: F403
