"""`enable` and `disable`: put a policy to work on a diffusers denoiser, and take it off again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from attnreuse.binding import loops
from attnreuse.binding.denoiser import find_denoiser, part_of, unwrapped
from attnreuse.binding.session import ATTRIBUTE, Session
from attnreuse.binding.shapes import parse_bytes
from attnreuse.maps.formats import format_named
from attnreuse.planning.levels import check_levels
from attnreuse.policy import Policy, Rule, Stretched, hurry, load_policy


def enable(
    pipe: Any,
    policy: Policy | Rule | str | Path | None = None,
    *,
    fit: Literal["exact", "stretch"] = "exact",
    map_format: str = "u8",
    memory_budget: int | str | None = None,
    layers: str | Sequence[str] | None = None,
    scheduler: Any = None,
    strict: bool = False,
) -> Session:
    """Reuse attention maps in `pipe` as `policy` says, until :func:`disable`.

    A layer reuses only a map that it wrote in the same run, for the same conditions and shapes. Otherwise
    it computes exactly; the report counts such calls with the reason, and a warning names the first.

    Args:
        pipe: a diffusers pipeline, or its denoiser; docs/adapters.md lists the models that are served.
        policy: which executed steps reuse: a :class:`Policy` for one number of steps; a rule for any, such as
            ``hurry(reuse=0.5)``; a file of either, or ``"user/name"`` on the Hugging Face Hub.
            None: ``hurry(reuse=0.5)``.
        fit: "exact": a policy for another number of steps than a run executes does not reuse in it.
            "stretch": it is stretched to the run, by noise level (:meth:`Policy.stretch`).
        map_format: "fp32", "fp16", "bf16", "u8", "u7" or "u4".
        memory_budget: most bytes the maps of a denoiser call may take, a number or like "4GiB"; layers
            that do not fit only compute, and are reported. None: whatever the policy needs.
        layers: "self" (self-attention and joint attention), "cross", "all", or ``fnmatch`` patterns of layer names.
            None: "self", and the layers that the policy speaks of by their full names.
        scheduler: for a denoiser without its pipeline whose timesteps are not taken from a tensor; or
            call :meth:`Session.step` in your loop.
        strict: whatever keeps a layer from doing what the policy says is an error instead of a warning, but for
            the memory budget, and layers that another tool does not call.

    Returns:
        The session: ``.report()`` after a run, ``.disable()``, usable in ``with``. A session already
        on this denoiser is disabled first.

    Raises:
        UnsupportedLayerError: no layer can be served, or under `strict` one cannot.
        ValueError: unknown format, fit, layer pattern or budget, a broken policy file, or a rule that needs noise
            levels where the scheduler has none.
    """
    denoiser = find_denoiser(pipe)
    is_pipe = part_of(pipe) is not None
    options = (format_named(map_format), parse_bytes(memory_budget), layers, strict, hasattr(pipe, "_orig_mod"))
    session = Session(denoiser, pipe if is_pipe else None, scheduler, _fitted(policy, fit, pipe, scheduler), *options)
    disable(pipe)
    session._attach()
    return session


def _fitted(policy: Policy | Rule | str | Path | None, fit: str, pipe: Any, scheduler: Any) -> Policy | Rule:
    if fit not in ("exact", "stretch"):
        raise ValueError(f"fit must be 'exact' or 'stretch', got {fit!r}")
    fitted = hurry(reuse=0.5) if policy is None else load_policy(policy)
    if fit == "stretch" and isinstance(fitted, Policy):
        fitted = Stretched(policy=fitted)
    scheduler = scheduler or getattr(pipe, "scheduler", None)
    if isinstance(fitted, Rule) and fitted.uses_levels and scheduler is not None:
        check_levels(scheduler)
    return fitted


def disable(pipe: Any) -> None:
    """Undo :func:`enable` on a pipeline or denoiser; nothing happens where nothing was enabled."""
    sessions = [session for session in loops.listeners() if session.pipe is pipe]  # also of a denoiser it had before
    denoiser = unwrapped(pipe) if sessions else find_denoiser(pipe)
    sessions.append(getattr(denoiser, ATTRIBUTE, None))
    for session in sessions:
        if session is not None:
            session.disable()
