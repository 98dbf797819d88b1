"""Hooks on a denoiser that die with their session, and stay behind on no copy of the denoiser."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


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
