"""Public path of :mod:`attnreuse.study.analysis`."""

from attnreuse.study.analysis import *  # noqa: F403
