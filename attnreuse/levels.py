"""Noise levels of a run's denoiser calls, as log-SNR: what rules are resolved from.

The level of a timestep is ``log(alpha_bar / (1 - alpha_bar))`` of the training schedule, between its entries by
interpolation, or ``2 log((1 - sigma) / sigma)`` for flow matching: the same for every sampler of a model.
Nothing here waits for a device: where timesteps lie on one, a copy of the scheduler makes them anew on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIMIT = 16.0  # |log-SNR| beyond which nothing changes any more: zero terminal SNR, the last step of flow matching


def noise_levels(scheduler: Any) -> list[float]:
    """The log-SNR at each timestep that `scheduler` is set to, in the order of its timesteps.

    Raises:
        ValueError: a scheduler without noise levels.
    """
    check_levels(scheduler)
    timesteps, sigmas = _on_host(scheduler)
    config = getattr(scheduler, "config", {})
    is_flow = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
    is_flow = is_flow or config.get("prediction_type") == "flow_prediction"
    if is_flow:
        sigma = timesteps / config["num_train_timesteps"] if sigmas is None else sigmas
        levels = 2 * torch.log((1 - sigma) / sigma)
    elif sigmas is not None:
        levels = -2 * torch.log(sigmas / config.get("sigma_data", 1.0))
    else:
        of = scheduler if scheduler.alphas_cumprod.device.type == "cpu" else _fresh(scheduler)
        table = torch.logit(of.alphas_cumprod.double(), eps=1e-8)
        below = timesteps.floor().clamp(0, len(table) - 1).long()
        above = (below + 1).clamp(max=len(table) - 1)
        levels = torch.lerp(table[below], table[above], timesteps - below)
    return levels.clamp(-LIMIT, LIMIT).tolist()


def check_levels(scheduler: Any) -> None:
    """Raise ValueError for a scheduler without noise levels."""
    if not any(isinstance(getattr(scheduler, name, None), Tensor) for name in ("alphas_cumprod", "sigmas")):
        raise ValueError(
            f"{type(scheduler).__name__} has no noise levels (neither alphas_cumprod nor sigmas): give a policy with "
            "a step count, such as hurry(steps, reuse), or periodic(interval=2)"
        )


def _on_host(scheduler: Any) -> tuple[Tensor, Tensor | None]:
    """Timesteps on the host; or, where these are not to be had or tell no level, the noise levels sigma instead."""
    timesteps, count = scheduler.timesteps, len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    known = isinstance(sigmas, Tensor) and sigmas.device.type == "cpu" and len(sigmas) >= count
    sigmas = sigmas[:count].double() if known else None
    if not hasattr(scheduler, "alphas_cumprod"):
        return timesteps, sigmas
    if timesteps.device.type == "cpu":
        return timesteps.double(), None
    twin = _fresh(scheduler)
    twin.set_timesteps(scheduler.num_inference_steps)
    alike = len(twin.timesteps) == count and not getattr(scheduler, "custom_timesteps", False)
    if alike and (not known or torch.equal(twin.sigmas[:count].double(), sigmas)):
        return twin.timesteps.double(), None
    if known:  # sigmas of one's own
        return timesteps, sigmas
    return timesteps.cpu().double(), None  # timesteps of one's own: one transfer a run


def _fresh(scheduler: Any) -> Any:
    """The scheduler as its config makes it, on the host."""
    return type(scheduler).from_config(scheduler.config)
