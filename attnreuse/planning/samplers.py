"""Samplers by the names people use, made from a model's scheduler config."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

ODE, SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # diffusers' class, and what is set besides the model's own config
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),  # as Stable Diffusion runs it
    "LMS": ("LMSDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", ODE),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", SDE),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", ODE),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
ALIASES = {"DPM": "DPM++ 2M", "Euler ancestral": "Euler a", "DPM2 ancestral": "DPM2 a"}


def make_scheduler(config: dict[str, Any], name: str | None) -> Any:
    """The scheduler of a config as read from a model, or the sampler `name` with that config.

    Args:
        name: one of ``SAMPLERS``, with " Karras" behind it for Karras's noise levels, or the name of a scheduler
            class of diffusers; case, spaces and dashes do not matter.

    Raises:
        ValueError: unknown name, no Karras levels, or a package is missing; the message says what to do.
    """
    import diffusers

    wanted = config["_class_name"] if name is None else name
    sampler, karras = _key(wanted), name is not None and _key(name).endswith("karras")
    known = {_key(n): made for n, made in SAMPLERS.items()} | {_key(a): SAMPLERS[n] for a, n in ALIASES.items()}
    classes = {_key(n): n for n in dir(diffusers) if n.endswith("Scheduler")}
    sampler = sampler.removesuffix("karras") if karras else sampler
    cls_name, extra = known.get(sampler, (classes.get(sampler) or classes.get(f"{sampler}scheduler"), {}))
    if cls_name is None:
        raise ValueError(
            f"--scheduler must be one of {', '.join(SAMPLERS)}, one of these with Karras behind it, or a scheduler "
            f"class of diffusers, got {wanted!r}"
        )
    cls = getattr(diffusers, cls_name)
    if cls_name == "DPMSolverSDEScheduler" and importlib.util.find_spec("torchsde") is None:
        raise ValueError(f"--scheduler {wanted} needs torchsde: pip install torchsde; DPM++ 2M SDE does without")
    spaced = "use_karras_sigmas" in inspect.signature(cls.__init__).parameters
    if karras and not spaced:
        raise ValueError(f"--scheduler {wanted}: {cls_name} has no Karras noise levels")
    if "FlowMatch" in cls_name and "FlowMatch" not in config.get("_class_name", cls_name):
        raise ValueError(f"--scheduler {wanted}: {cls_name} is for models trained by flow matching, this one is not")
    if spaced and sampler in known:  # a name says what it is, whatever the model's config says
        extra = {**extra, "use_karras_sigmas": karras}
    try:
        return cls.from_config(config, **extra)
    except (TypeError, ImportError) as error:
        raise ValueError(f"--scheduler {wanted}: {cls_name} cannot be made for this model: {error}") from error


def step_options(scheduler: Any, eta: float | None) -> dict[str, Any]:
    """What a pipeline call hands on to the scheduler for `eta`, the share of noise that DDIM and TCD add anew.

    Raises:
        ValueError: the scheduler has no eta.
    """
    if eta is None:
        return {}
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"--eta: {type(scheduler).__name__} has none; DDIM and TCD have")
    return {"eta": eta}


def _key(name: str) -> str:
    return name.lower().translate(str.maketrans("", "", " -_"))
