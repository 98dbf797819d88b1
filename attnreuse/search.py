"""Public path of what :mod:`attnreuse.study.search` holds."""

from attnreuse.study.search.engines import Engine, InProcess, RayEngine
from attnreuse.study.search.front import Front, Point
from attnreuse.study.search.judge import Judge
from attnreuse.study.search.ladder import ladder
from attnreuse.study.search.objective import Improvement, Objective, SearchResult
from attnreuse.study.search.phast import exhaustive, phast

__all__ = [
    "Engine", "Front", "Improvement", "InProcess", "Judge", "Objective", "Point", "RayEngine", "SearchResult",
    "exhaustive", "ladder", "phast",
]  # fmt: skip
