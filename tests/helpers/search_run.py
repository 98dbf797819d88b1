"""A slow search in a process of its own, to be killed: python search_run.py CACHE."""

import sys

from fake_engine import FakeEngine

from attnreuse.search import phast


def run(cache, delay=0.0):
    engine = FakeEngine(12, delay)
    found = phast(None, 12, 5, ["a prompt"], engine=engine, restarts=2, seed=3, budget=150, cache=cache)
    return found, engine


if __name__ == "__main__":
    run(sys.argv[1], delay=0.01)
