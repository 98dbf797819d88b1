"""Hears pipelines of diffusers enter and leave their denoising loops.

Every pipeline steps through ``progress_bar``, and leaves it also when the loop raises. While a session
listens, the class that defines it hands out a bar that says so; the last session puts the method back.
This tells which pipeline (of several that share a denoiser) makes a call, how many steps it means to
take, and when its maps are no longer needed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

_local = threading.local()  # .loops: those the thread is in, innermost last
_door = threading.Lock()
_listeners: weakref.WeakSet = weakref.WeakSet()  # objects with `loop_entered(loop)`
_patched: dict[type, Callable] = {}  # class to its own `progress_bar`


class Loop:
    """One pass of a pipeline through its progress bar, for which it stands in.

    Attributes:
        pipe: the pipeline, or a block of a modular one.
        total: steps it announced, or None.
        timesteps: the tensor it walks over, where it was told; or None.
    """

    def __init__(self, bar: Any, pipe: Any, iterable: Any, total: int | None):
        self._bar, self._exits, self._parts = bar, [], None
        self.pipe, self.total = pipe, total
        self.timesteps = iterable if isinstance(iterable, Tensor) else None

    def may_call(self, denoiser: Any) -> bool:
        """Whether `denoiser` is a part of this pipeline, as far as that can be told."""
        if self._parts is None:
            self._parts = [getattr(part, "_orig_mod", part) for part in components(self.pipe).values()]
        return not self._parts or any(part is denoiser for part in self._parts)

    def on_exit(self, call: Callable[[], None]) -> None:
        """Have `call` made when the loop is left, with or without an exception."""
        self._exits.append(call)

    def _enter(self) -> None:
        self._stack = _stack()
        self._stack.append(self)
        for listener in listeners():
            listener.loop_entered(self)

    def _exit(self, inner: bool) -> None:
        """Leave the loop, and the `inner` ones: all that were entered since, where it is left in their order."""
        if self in self._stack:
            at = self._stack.index(self)
            del self._stack[at : None if inner else at + 1]
        while self._exits:
            self._exits.pop()()

    def __enter__(self) -> Loop:
        self._bar.__enter__()
        self._enter()
        return self

    def __exit__(self, *exc: object) -> Any:
        self._exit(inner=True)
        return self._bar.__exit__(*exc)

    def __iter__(self) -> Iterator[Any]:
        self._enter()
        try:
            yield from self._bar
        finally:
            self._exit(inner=False)

    def __len__(self) -> int:
        return len(self._bar)

    def __bool__(self) -> bool:
        return True  # also a bar over an iterable without a length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_bar"], name)


def _stack() -> list[Loop]:
    if not hasattr(_local, "loops"):
        _local.loops = []
    return _local.loops


def current(denoiser: Any, pipe: Any = None) -> Loop | None:
    """The innermost loop this thread is in, of `pipe` or another pipeline that may be calling `denoiser`."""
    return next((loop for loop in reversed(_stack()) if loop.pipe is pipe or loop.may_call(denoiser)), None)


def components(pipe: Any) -> dict[str, Any]:
    """Parts of a pipeline by name; none for a block of a modular pipeline, which is handed them."""
    parts = getattr(pipe, "components", None)
    return parts if isinstance(parts, dict) else {}


def schedulers(likeliest: Any, loop: Loop | None, pipe: Any) -> Iterator[Any]:
    """Those that may have made the timestep of a call, likeliest first; the first may be None."""
    pipes = [owner for owner in (None if loop is None else loop.pipe, pipe) if owner is not None]
    yield likeliest
    for owner in pipes:
        yield getattr(owner, "scheduler", None)
    for owner in pipes:
        yield from (part for name, part in components(owner).items() if "scheduler" in name)


def listen(listener: Any, pipe: Any = None) -> None:
    """Call ``listener.loop_entered(loop)`` from now on, for pipelines of diffusers and of `pipe`'s class."""
    with _door:
        _listeners.add(listener)
        for owner in _owners(pipe):
            if owner not in _patched:
                _patched[owner] = owner.__dict__["progress_bar"]
                owner.progress_bar = _heard(_patched[owner])


def listeners() -> list[Any]:
    """Those that :func:`listen` was called for."""
    return list(_listeners)


def stop(listener: Any) -> None:
    """Undo :func:`listen`; with the last listener the classes get their methods back."""
    with _door:
        _listeners.discard(listener)
        if _listeners:
            return
        for owner, original in _patched.items():
            if getattr(owner.__dict__["progress_bar"], "heard_by_attnreuse", False):
                owner.progress_bar = original
        _patched.clear()


def _owners(pipe: Any) -> list[type]:
    """Classes that define the progress bars to listen to."""
    from diffusers import DiffusionPipeline

    classes = [DiffusionPipeline, *type(pipe).__mro__]
    try:
        from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks

        classes += LoopSequentialPipelineBlocks.__mro__
    except ImportError:  # diffusers before 0.35 has no modular pipelines
        pass
    return [c for c in dict.fromkeys(classes) if "progress_bar" in c.__dict__]


def _heard(original: Callable) -> Callable:
    @functools.wraps(original)
    def progress_bar(self: Any, iterable: Any = None, total: int | None = None, **options: Any) -> Any:
        bar = original(self, iterable=iterable, total=total, **options)
        return Loop(bar, self, iterable, total) if _listeners and bar is not None else bar

    progress_bar.heard_by_attnreuse = True
    return progress_bar
