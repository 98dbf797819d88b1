"""Public path of :mod:`attnreuse.maps.formats`."""

from attnreuse.maps.formats import *  # noqa: F403
