"""Public path of :mod:`attnreuse.maps.formats`."""

from attnreuse.maps.formats import BLOCK, FORMATS, AttentionMap, MapFormat, format_named, map_format

__all__ = ["BLOCK", "FORMATS", "AttentionMap", "MapFormat", "format_named", "map_format"]
