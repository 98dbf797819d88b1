"""What is attached to a module: taken off together, and left behind on no copy of a denoiser."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module


class Attached:
    """Hooks, a forward and processors on a module, until :meth:`detach`; also a context manager.

    Args:
        module: whose calls are heard.
        before: called with the module and the positional and named arguments of each call.
        after: called with the same and the output, also when the call raised; then the output is None.
        forward: what the module runs instead of its own.
        processors: what attention modules attend with instead of their own.
    """

    def __init__(
        self,
        module: Module,
        *,
        before: Callable[[Module, tuple, dict], None] | None = None,
        after: Callable[[Module, tuple, dict, Any], None] | None = None,
        forward: Callable | None = None,
        processors: Mapping[Any, Any] | None = None,
    ):
        self._undo: list[Callable[[], object]] = []
        try:
            if before is not None:
                self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:
                self._undo.append(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
            if forward is not None:
                self._replace_forward(module, forward)
            for attn, processor in (processors or {}).items():
                self._undo.append(functools.partial(attn.set_processor, attn.processor))
                attn.set_processor(processor)
        except BaseException:
            self.detach()
            raise

    def _replace_forward(self, module: Module, forward: Callable) -> None:
        own = module.__dict__.get("forward")  # of offloading, such
        module.forward = forward
        self._undo.append(
            functools.partial(delattr, module, "forward")
            if own is None
            else functools.partial(setattr, module, "forward", own)
        )

    def detach(self) -> None:
        """The module is as it was before."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


class Hook:
    """A method of the session, called around its denoiser; nothing on a copied or unpickled denoiser."""

    def __init__(self, session: Any, method: str):
        self._session, self._method = weakref.ref(session), method

    def _call(self, module: Any, *args: Any) -> None:
        session = self._session()
        if session is not None and module is session.denoiser:
            getattr(session, self._method)(*args)

    def __reduce__(self) -> tuple:
        return _inert_hook, ()

    @classmethod
    def of(cls, session: Any, method: str) -> Hook:
        if "__call__" not in cls.__dict__:  # not sooner: it imports the compiler
            cls.__call__ = torch.compiler.disable(cls._call)
        return cls(session, method)


def nothing(*args: Any) -> None:
    return None


def _inert_hook() -> Callable[..., None]:
    return nothing
