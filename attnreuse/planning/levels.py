"""Noise levels of a run's denoiser calls, as log-SNR, and their influence: what rules are resolved from.

The level of a timestep is ``log(alpha_bar / (1 - alpha_bar))`` of the training schedule, between its entries by
interpolation; ``2 log((1 - sigma) / sigma)`` for flow matching; ``-2 log sigma`` for schedulers that know sigma alone.
Where timesteps lie on a device they are not read: a copy of the scheduler makes them anew on the host. Only those that
a copy may not make (custom ones, LCM's and TCD's, flow matching's, copies of a scheduler's) cost one transfer a run.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from attnreuse.planning.rows import Influence

INSTEAD = "give a policy with a step count, such as hurry(steps, reuse), or periodic(interval=2)"
MOST = 200  # calls for which influences are told: it takes a run of as many rows
_known: dict[str, list[float] | None] = {}  # influences, by scheduler, config and walk
LIMIT = 16.0  # |log-SNR| beyond which nothing changes any more: zero terminal SNR, the last step of flow matching


def noise_levels(scheduler: Any, timesteps: Tensor | None = None) -> list[float]:
    """The log-SNR at each timestep that `scheduler` is set to, or at each of `timesteps`, in their order.

    Raises:
        ValueError: a scheduler without noise levels, or whose levels cannot be read.
    """
    check_levels(scheduler)
    try:
        levels = _levels(scheduler, timesteps)
    except Exception as error:
        name, why = type(scheduler).__name__, f"{type(error).__name__}: {error}"
        raise ValueError(f"the noise levels of {name} cannot be read ({why}): {INSTEAD}") from error
    if levels.isnan().any():
        raise ValueError(f"{type(scheduler).__name__} has noise levels that are no numbers: {INSTEAD}")
    return levels.clamp(-LIMIT, LIMIT).tolist()


def influences(scheduler: Any) -> Influence | None:
    """How far a unit error of each denoiser call's output moves the sample that the run ends with.

    The scheduler itself tells: it is run for pictures that are Gaussian noise of unit variance. There an exact
    denoiser's output, as v, is zero, so all that moves its sample is an error that is put into one call. Samplers of
    two calls a step differ in this most: the first call of DPM2 only finds the middle of its step. With flow matching
    that foretells too little of early calls: there it is "even" (docs/results.md has what was measured).

    Returns:
        One number per timestep that `scheduler` is set to; None where that cannot be told (a scheduler that cannot
        predict v, more than ``MOST`` calls, noise that cannot be repeated, custom timesteps on a device).
    """
    try:
        if _is_flow(scheduler):
            return "even"
        twin = _rewound(scheduler)
        if twin is None or len(twin.timesteps) > MOST or "prediction_type" not in twin.config:
            return None
        sigmas = getattr(twin, "sigmas", None)
        walk = (twin.timesteps.tolist(), sigmas.tolist() if isinstance(sigmas, Tensor) else None)
        key = f"{type(twin)} {dict(twin.config)} {walk}"
        if key not in _known:
            if len(_known) >= 64:
                _known.clear()
            _known[key] = _influences(twin)
        return _known[key]
    except Exception:  # whatever a scheduler raises that is run in a way it does not know
        return None


def resolved(rule: Any, scheduler: Any, steps: int) -> Any:
    """The policy that a rule makes for the `steps` calls that `scheduler` is set to."""
    if not rule.uses_levels:
        return rule.resolve(steps)
    return rule.resolve(steps, noise_levels(scheduler), influences(scheduler))


def check_levels(scheduler: Any) -> None:
    """Raise ValueError for a scheduler without noise levels."""
    if not any(isinstance(getattr(scheduler, name, None), Tensor) for name in ("alphas_cumprod", "sigmas")):
        name = type(scheduler).__name__
        raise ValueError(f"{name} has no noise levels (neither alphas_cumprod nor sigmas): {INSTEAD}")


def _levels(scheduler: Any, timesteps: Tensor | None) -> Tensor:
    config = getattr(scheduler, "config", {})
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), _sigmas(scheduler)
    if _is_flow(scheduler) or (table is None and sigmas is not None and bool((sigmas <= 1).all())):
        if timesteps is not None or sigmas is None:
            at = scheduler.timesteps if timesteps is None else timesteps
            sigmas = at.cpu().double() / config["num_train_timesteps"]
        return 2 * torch.log((1 - sigmas) / sigmas)
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    if table is None or continuous:  # whose timesteps are log(sigma) / 4
        if timesteps is not None or sigmas is None:
            at = scheduler.timesteps if timesteps is None else timesteps
            sigmas = torch.exp(4 * at.cpu().double())
        return -2 * torch.log(sigmas / config.get("sigma_data", 1.0))
    at = _on_host(scheduler, sigmas) if timesteps is None else timesteps.cpu().double()
    if at is None:
        return -2 * torch.log(sigmas)
    of = table if table.device.type == "cpu" else _fresh(scheduler).alphas_cumprod
    entries = torch.logit(of.double(), eps=1e-8)
    below = at.floor().clamp(0, len(entries) - 1).long()
    above = (below + 1).clamp(max=len(entries) - 1)
    return torch.lerp(entries[below], entries[above], at - below)


def _is_flow(scheduler: Any) -> bool:
    """Is it of flow matching, by the name of its class or of one that this builds on, or by config?"""
    config = getattr(scheduler, "config", {})
    by_config = config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    return by_config or any("FlowMatch" in cls.__name__ for cls in type(scheduler).__mro__)


def _sigmas(scheduler: Any) -> Tensor | None:
    """The scheduler's sigmas at its timesteps, where it keeps them on the host."""
    sigmas, count = getattr(scheduler, "sigmas", None), len(scheduler.timesteps)
    known = isinstance(sigmas, Tensor) and sigmas.device.type == "cpu" and len(sigmas) >= count
    return sigmas[:count].double() if known else None


def _on_host(scheduler: Any, sigmas: Tensor | None) -> Tensor | None:
    """The scheduler's timesteps on the host; None where only its sigmas are to be had there."""
    timesteps, steps = scheduler.timesteps, scheduler.num_inference_steps
    if timesteps.device.type == "cpu":
        return timesteps.double()
    others = {"strength", "original_inference_steps"} & set(inspect.signature(scheduler.set_timesteps).parameters)
    if steps is not None and not others and not getattr(scheduler, "custom_timesteps", False):
        twin = _fresh(scheduler)
        twin.set_timesteps(steps)
        alike = len(twin.timesteps) == len(timesteps)
        if alike and (sigmas is None or torch.equal(_sigmas(twin), sigmas)):
            return twin.timesteps.double()
    return timesteps.cpu().double() if sigmas is None else None


def _fresh(scheduler: Any) -> Any:
    """The scheduler as its config makes it, on the host."""
    return type(scheduler).from_config(scheduler.config)


def _influences(twin: Any) -> list[float] | None:
    """:func:`influences` of a scheduler before its first step, which is run."""
    count = len(twin.timesteps)
    twin.register_to_config(prediction_type="v_prediction", clip_sample=False, thresholding=False)
    rows, size = count + 2, 1e-2  # the last two rows get no error: alike, unless noise differs from row to row
    given = {}
    if "generator" in inspect.signature(twin.step).parameters:
        given["generator"] = [torch.Generator().manual_seed(0) for _ in range(rows)]
    x = torch.zeros(rows, 1, 1, 1)
    for call, t in enumerate(twin.timesteps):
        twin.scale_model_input(x, t)
        error = torch.zeros_like(x)
        error[call] = size
        x = twin.step(error, t, x, **given).prev_sample
    moved = ((x - x[-1]).abs().double() / size).flatten()
    return moved[:count].tolist() if moved[-2] == 0 and moved.isfinite().all() else None


def _rewound(scheduler: Any) -> Any:
    """A copy of the scheduler on the host, before its first step; None where its timesteps cannot be made there."""
    twin, on_host = _fresh(scheduler), scheduler.timesteps.device.type == "cpu"
    if scheduler.num_inference_steps is not None and not getattr(scheduler, "custom_timesteps", False):
        twin.set_timesteps(scheduler.num_inference_steps)
        made = scheduler.timesteps if on_host else _on_host(scheduler, _sigmas(scheduler))
        if made is not None and torch.equal(twin.timesteps.double(), made.double()):
            return twin
    if not on_host:
        return None
    twin = copy.deepcopy(scheduler)  # it has timesteps of somebody's own
    for name in ("_step_index", "_begin_index"):
        if hasattr(twin, name):
            setattr(twin, name, None)
    return twin
