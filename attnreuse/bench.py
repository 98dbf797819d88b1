"""Public path of :mod:`attnreuse.study.bench`."""

from attnreuse.study.bench import *  # noqa: F403
