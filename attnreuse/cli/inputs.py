"""What becomes of options: a pipeline, a policy, a setting, a place to write to; wrong ones are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer

from attnreuse.errors import AttnReuseError


def find_model(model: str) -> tuple[str, bool]:
    """The folder or hub name of a pipeline (nothing: the shipped one), and whether only files here are to be read.

    Raises:
        ValueError: neither a folder with a pipeline nor the form of a hub name.
        AttnReuseError: the hub does not give it.
    """
    from attnreuse import tiny_shapes_path
    from attnreuse.hub import is_online

    folder = Path(model or tiny_shapes_path()).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"--model: {model} holds no pipeline (no model_index.json)")
        return str(folder), True
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"--model: no such folder: {model} (a hub name is like user/pipeline)")
    try:
        return model, not is_online(model, "model_index.json")
    except AttnReuseError as error:
        raise AttnReuseError(f"--model: {error}") from error


def load_pipeline(model: str, scheduler: str | None) -> Any:
    """The pipeline on the default device, with the sampler asked for, silent."""
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    from attnreuse.measure.environment import default_device
    from attnreuse.planning.samplers import make_scheduler
    from attnreuse.study.blueprint import class_of

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    (path, local), device = find_model(model), default_device()
    name, known = class_of(DiffusionPipeline.load_config(path, local_files_only=local))
    if known is None:
        raise AttnReuseError(f"--model: diffusers has no {name}: load it in a program, and call attnreuse.enable(pipe)")
    pipe = DiffusionPipeline.from_pretrained(path, local_files_only=local).to(device, default_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = make_scheduler(pipe.scheduler.config, scheduler)
    return pipe


def default_dtype(device: Any) -> Any:
    """fp16 on CUDA devices, else fp32."""
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def default_format(device: Any, dtype: Any) -> str:
    """u8 where a kernel serves it; through plain torch fp32 maps are the fastest."""
    from attnreuse import ops

    return "fp32" if ops.backend_for("u8", device, dtype, 64) == "torch" else "u8"


def policy_for(
    file: str | None, fit: str, model: str, scheduler: Any, steps: int, reuse: float, max_age: int | None
) -> Any:
    """The policy for a run: of the file; else, for the shipped model, the shipped one that fits; else HURRY."""
    from attnreuse.binding.clock import executed_steps
    from attnreuse.planning.levels import resolved
    from attnreuse.policy import Policy, Stretched, hurry, shipped_policies

    executed = executed_steps(scheduler, steps)
    if file is not None:
        loaded = read_policy(file)
        if isinstance(loaded, Policy) and fit == "exact" and loaded.steps != executed:
            raise ValueError(
                f"--policy {file} is for {loaded.steps} executed steps, this run executes {executed}: --fit stretch"
            )
        if isinstance(loaded, Policy) and loaded.steps == executed:
            return loaded
        rule = Stretched(policy=loaded) if isinstance(loaded, Policy) else loaded
        return resolved(rule, scheduler, executed)
    count = count_for(reuse, executed)
    if max_age is not None:
        return hurry(executed, count, max_age or None)
    fitting = shipped_policies(type(scheduler).__name__, executed) if not model else []
    fitting = [p for p in fitting if p.reuse_steps == count]
    rule = hurry(reuse=reuse if reuse < 1 else count / executed)
    return fitting[0] if fitting else resolved(rule, scheduler, executed)


def count_for(reuse: float, executed: int) -> int:
    """How many of the executed steps reuse: of a share below 1, or of their number."""
    from attnreuse.planning.rows import count_of

    if not math.isfinite(reuse) or (reuse >= 1 and reuse != int(reuse)):
        raise ValueError(f"--reuse must be a share below 1 or a whole number of steps, got {reuse}")
    count = int(reuse) if reuse >= 1 else count_of(reuse, executed)
    if count >= executed:
        raise ValueError(f"--reuse must be between 0 and {executed - 1} for {executed} steps, got {reuse:g}")
    return count


def read_policy(file: str) -> Any:
    """The policy or rule of a file or hub name; one without a name of its own takes the file's.

    Raises:
        ValueError: it cannot be read; the message names the option.
    """
    from attnreuse.policy import Policy, load_policy

    try:
        loaded = load_policy(file)
    except OSError as error:
        said = f"{file}: {error.strerror}" if error.strerror else error
        raise ValueError(f"--policy: {said}") from error
    except (AttnReuseError, ValueError) as error:
        raise ValueError(f"--policy: {error}") from error
    is_unnamed = isinstance(loaded, Policy) and loaded.name == Policy.model_fields["name"].default
    return loaded.model_copy(update={"name": Path(file).stem}) if is_unnamed else loaded


def check_prompts(context: typer.Context, model: str, prompts: list[str] | None) -> None:
    """Refuse a model without prompts, and prompts beside a number of pictures."""
    if not prompts and model:
        raise ValueError("--model needs --prompt (repeatable): the default captions are those of the shipped pipeline")
    if prompts:
        refuse_beside(context, "--prompt", "images")


def setting_for(
    model: str,
    prompts: list[str] | None,
    images: int,
    steps: int,
    seed: int,
    guidance: float | None,
    eta: float | None,
    map_format: str | None,
    layers: str | None,
    batch: int,
    held_out: bool = False,
) -> Any:
    """What to sample: the prompts given, or `images` captions of the shipped pipeline's grammar."""
    from attnreuse import TINY_SHAPES_GUIDANCE
    from attnreuse.demo import tiny_shapes
    from attnreuse.measure.environment import default_device
    from attnreuse.study.setting import Setting

    draw = tiny_shapes.held_out_prompts if held_out else tiny_shapes.search_prompts
    device = default_device()
    return Setting(
        tuple(prompts or draw(images)),
        steps,
        seed,
        TINY_SHAPES_GUIDANCE if guidance is None and not model else guidance,
        eta,
        map_format=map_format or default_format(device, default_dtype(device)),
        layers=layers,
        batch=batch,
    )


def writable(option: str, path: Path, suffix: str | None = None) -> None:
    """Refuse a bad place to write to before hours are spent."""
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(f"{option} must end in {suffix}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: no such folder: {path.absolute().parent}")
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()


def refuse_ignored(context: typer.Context, option: str, chosen: str, only_for: dict[str, tuple[str, ...]]) -> None:
    """Refuse options that were given, and that `option` as `chosen` makes no use of."""
    for name, users in only_for.items():
        if is_given(context, name) and chosen not in users:
            raise ValueError(f"{_typed(name)} is for {option} {' or '.join(users)}, not for {chosen}")


def refuse_beside(context: typer.Context, option: str, *others: str) -> None:
    """Refuse options that were given beside `option`, which decides what they would."""
    for name in others:
        if is_given(context, name):
            raise ValueError(f"{option} decides that already: leave out {_typed(name)}")


def refuse_without(context: typer.Context, option: str, *others: str) -> None:
    """Refuse options that were given, and that mean nothing without `option`, which was not."""
    for name in others:
        if is_given(context, name):
            raise ValueError(f"{_typed(name)} is for {option}, which is not given")


def is_given(context: typer.Context, name: str) -> bool:
    """Was this parameter of the command typed?"""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
