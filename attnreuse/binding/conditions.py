"""What a denoiser call attends over, and which rows of an earlier call's batch attend over the same.

Identity first: the same memory, not written to since, holds the same values, which costs no wait for the
device. Values are compared only where the memory differs. Tensors of ``torch.inference_mode`` do not count
what is written to them, so they are kept as copies and always compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor

PLAIN = (Number, str, bytes, tuple, frozenset, Enum, torch.device, torch.dtype)  # settings that are compared by value


class Conditions:
    """The conditions of one denoiser call, row by row.

    Args:
        given: arguments of the denoiser, by name, besides its sample and timestep.
        batch: rows of its sample.
        each_step: names of what is made anew at each step, and is no condition.
        query_key_state: of what the model's queries and keys are made by.

    Attributes:
        group: one object for calls whose conditions are known to be the same, row by row.
        tensors: what must have the same values.
        settings: what must be the same and is no tensor: scales, layers to skip, what queries and keys are made by.
        beside: names of what is given, and made anew at each step.
    """

    def __init__(self, given: dict[str, Any], batch: int, each_step: Collection[str] = (), query_key_state: tuple = ()):
        self.batch, self.group = batch, object()
        leaves = dict(_leaves_in(given, {*each_step, "return_dict"}))
        self.tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        self.settings = {name: _plain(leaf) for name, leaf in leaves.items() if name not in self.tensors}
        self.settings |= {"what makes queries and keys": query_key_state} if query_key_state else {}
        self.beside = {name for name in each_step if given.get(name) is not None}
        self._versions = {name: writes(t) for name, t in self.tensors.items()}
        self._addresses = {name: t.data_ptr() for name, t in self.tensors.items()}
        self._kept = {name: t.clone() if self._versions[name] is None else t for name, t in self.tensors.items()}

    def rows_of(self, earlier: Conditions, values: bool = True) -> list[int] | None:
        """For each row of this call, the row of `earlier` with the same conditions; None if one has none.

        Rows that cannot be told apart are taken in order if there are as many of them in both calls.
        Without `values` only memory that is the same counts.
        """
        if self.difference(earlier) is not None:
            return None
        names = list(self.tensors)
        if self.batch == earlier.batch and all(self._same_memory(earlier, name) for name in names):
            return list(range(self.batch))
        if all(earlier._untouched(name) for name in names):
            memory = [[self._address(n, i) for n in names] for i in range(self.batch)]
            held = [[earlier._address(n, j) for n in names] for j in range(earlier.batch)]
            rows = _matched(self.batch, earlier.batch, lambda i, j: memory[i] == held[j])
            if rows is not None:
                return rows
        if not values:
            return None
        same = self._same_values(earlier, names)
        return _matched(self.batch, earlier.batch, lambda i, j: same[i][j])

    def join(self, earlier: Conditions) -> None:
        """Note that these conditions are those of `earlier`, row by row."""
        self.group = earlier.group

    def difference(self, earlier: Conditions) -> str | None:
        """What keeps all rows from being the same, without a look at values; or None."""
        for now, then in ((self.tensors, earlier.tensors), (self.settings, earlier.settings)):
            if now.keys() != then.keys():
                name = next(iter(now.keys() ^ then.keys()))
                return f"{name} is {'new' if name in now else 'gone'}"
        for name, now in self.settings.items():
            if not _same(now, earlier.settings[name]):
                return _change(name, now, earlier.settings[name])
        for name, now in self.tensors.items():
            then = earlier.tensors[name]
            if (now.shape[1:], now.dtype, now.device) != (then.shape[1:], then.dtype, then.device):
                return f"{name} is {_described(now)}, it was {_described(then)}"
            if not earlier._untouched(name) and earlier._versions[name] is not None:
                return f"{name} was written to in place"
        return None

    def _untouched(self, name: str) -> bool:
        version = self._versions[name]
        t = self.tensors[name]
        return version is not None and (t._version, t.data_ptr()) == (version, self._addresses[name])

    def _same_memory(self, earlier: Conditions, name: str) -> bool:
        now, then = self.tensors[name], earlier.tensors[name]
        same = now is then or (now.data_ptr(), now.shape, now.stride()) == (then.data_ptr(), then.shape, then.stride())
        return same and earlier._untouched(name)

    def _address(self, name: str, row: int) -> tuple:
        t = self.tensors[name]
        step = t.stride(0) * t.element_size() if self._per_row(name) else 0
        return (t.data_ptr() + row * step, t.stride()[1:])

    def _same_values(self, earlier: Conditions, names: list[str]) -> list[list[bool]]:
        """Row by row: are all conditions equal? Waits for the device once."""
        same: Tensor | None = None  # [batch, earlier.batch]
        for name in names:
            now, then = self.tensors[name], earlier._kept[name]
            if self._per_row(name) and earlier._per_row(name):
                equal = (now[:, None] == then[None]).flatten(2).all(-1) if now.ndim > 1 else now[:, None] == then[None]
            else:
                equal = (now == then).all() if now.shape == then.shape else now.new_zeros((), dtype=torch.bool)
            same = equal if same is None else same.to(equal.device) & equal
        if same is None:
            return [[True] * earlier.batch] * self.batch
        return same.expand(self.batch, earlier.batch).tolist()

    def _per_row(self, name: str) -> bool:
        t = self.tensors[name]
        return t.ndim > 0 and len(t) == self.batch


def writes(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count that."""
    try:
        return tensor._version
    except RuntimeError:  # made in ``torch.inference_mode``, also where `is_inference` does not say so
        return None


def _leaves_in(given: dict[str, Any], left_out: Collection[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """Arguments but None, also those in tables and lists, each with its name."""
    for name, value in given.items():
        if name in left_out or value is None:
            continue
        if isinstance(value, dict):
            yield from _leaves_in(value, left_out, f"{above}{name}.")
        elif isinstance(value, (list, tuple)):
            yield from _leaves_in({f"{name}[{i}]": item for i, item in enumerate(value)}, left_out, above)
        else:
            yield above + name, value


def _plain(leaf: Any) -> Any:
    """What an array or a set holds now, since it may be written to; everything else as it is."""
    if hasattr(leaf, "tobytes") and hasattr(leaf, "dtype") and not leaf.dtype.hasobject:  # numpy need not be there
        return leaf.item() if leaf.size == 1 else (leaf.shape, leaf.dtype.str, leaf.tobytes())
    return frozenset(leaf) if isinstance(leaf, set) else leaf


def _same(now: Any, then: Any) -> bool:
    """Plain values that are equal; one and the same object, where its class may compare otherwise."""
    if now is then or not (isinstance(now, PLAIN) and isinstance(then, PLAIN)):
        return now is then
    try:
        return bool(now == then or (now != now and then != then))  # nan
    except Exception:  # a class that compares in a way of its own
        return False


def _change(name: str, now: Any, then: Any) -> str:
    short = all(isinstance(value, (Number, str, Enum)) for value in (now, then))
    return f"{name} is {now!r}, it was {then!r}" if short else f"{name} is another than before"


def _matched(rows: int, others: int, same: Callable[[int, int], bool]) -> list[int] | None:
    matches = [[j for j in range(others) if same(i, j)] for i in range(rows)]
    taken: dict[tuple[int, ...], int] = {}
    order = []
    for match in map(tuple, matches):
        if not match or len(match) != matches.count(list(match)):
            return None
        order.append(match[taken.get(match, 0)])
        taken[match] = taken.get(match, 0) + 1
    return order


def _described(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype}".replace("torch.", "")
