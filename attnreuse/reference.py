"""Public path of :mod:`attnreuse.maps.reference`."""

from attnreuse.maps.reference import *  # noqa: F403
