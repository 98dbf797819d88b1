"""Noise levels of a run's denoiser calls, as log-SNR: what rules are resolved from.

The level of a timestep is ``log(alpha_bar / (1 - alpha_bar))`` of the training schedule, between its entries by
interpolation; ``2 log((1 - sigma) / sigma)`` for flow matching; ``-2 log sigma`` for schedulers that know sigma alone.
Where timesteps lie on a device they are not read: a copy of the scheduler makes them anew on the host. Only those that
a copy may not make (custom ones, LCM's and TCD's, flow matching's, copies of a scheduler's) cost one transfer a run.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

INSTEAD = "give a policy with a step count, such as hurry(steps, reuse), or periodic(interval=2)"
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


def check_levels(scheduler: Any) -> None:
    """Raise ValueError for a scheduler without noise levels."""
    if not any(isinstance(getattr(scheduler, name, None), Tensor) for name in ("alphas_cumprod", "sigmas")):
        name = type(scheduler).__name__
        raise ValueError(f"{name} has no noise levels (neither alphas_cumprod nor sigmas): {INSTEAD}")


def _levels(scheduler: Any, timesteps: Tensor | None) -> Tensor:
    config = getattr(scheduler, "config", {})
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), _sigmas(scheduler)
    is_flow = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
    is_flow = is_flow or config.get("prediction_type") == "flow_prediction"
    if is_flow or (table is None and sigmas is not None and bool((sigmas <= 1).all())):
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
