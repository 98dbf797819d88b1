"""Public path of :mod:`attnreuse.maps.reference`."""

from attnreuse.maps.reference import capture, convert, drift, reuse

__all__ = ["capture", "convert", "drift", "reuse"]
