"""The life of one pipeline: acts of real use drawn one after the other, each run compared with a fresh process's.

``python tests/helpers/life.py --acts 10000`` lives a long life and prints what happened; ``binding/test_life.py`` a
short one. ``python tests/helpers/life.py --server`` is the fresh process: it forks for every request it reads, so that
each run is made by a process that has run nothing before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tiny_random import WIDTH, random_pipeline, random_unet

import attnreuse
from attnreuse import Policy, hurry
from attnreuse.maps.ring import MapRing

SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"]
PLACES = ["callback", "interrupt key", "scheduler", "denoiser", "interrupt flag"]  # where a run is stopped


@dataclasses.dataclass(frozen=True)
class Reuse:
    """How the pipeline is enabled: a policy for `steps` executed steps."""

    steps: int
    reuse: int
    late: bool
    layers: str
    map_format: str

    def policy(self) -> Policy:
        return hurry(self.steps, self.reuse, None if self.late else "least")


@dataclasses.dataclass(frozen=True)
class Request:
    """A run, and the state of the pipeline that it meets."""

    steps: int
    scheduler: str
    strength: float | None  # None: text to image
    size: tuple[int, int]
    batch: int
    tokens: int
    guidance: float
    seed: int
    reuse: Reuse | None
    lora: int | None  # the seed of its weights
    ip_adapter: bool
    sliced: bool
    own_loop: bool  # somebody's own instead of a pipeline's


class StoppedError(Exception):
    pass


def lora_state(seed: int, donor=None) -> dict[str, torch.Tensor]:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = donor or random_unet()
    torch.manual_seed(seed)
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(donor).items()}


def ip_adapter_state(unet) -> dict:
    g = torch.Generator().manual_seed(5)
    ip, names = {}, [n for n in unet.attn_processors if not n.endswith("attn1.processor")]
    for i, name in enumerate(names):
        width = unet.get_submodule(name.rsplit(".", 1)[0]).to_k.out_features
        for part in ("k", "v"):
            ip[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(width, WIDTH, generator=g) * 0.1
    ones, zeros = torch.ones(WIDTH), torch.zeros(WIDTH)
    image = {"proj.weight": torch.randn(4 * WIDTH, WIDTH, generator=g) * 0.1, "proj.bias": torch.zeros(4 * WIDTH)}
    return {"image_proj": {**image, "norm.weight": ones, "norm.bias": zeros}, "ip_adapter": ip}


class Life:
    """A pipeline and what has been done to it."""

    def __init__(self):
        self.pipe = random_pipeline()
        self.sibling = StableDiffusionImg2ImgPipeline.from_pipe(self.pipe)
        self.sibling.set_progress_bar_config(disable=True)
        self.session = self.reuse = self.lora = None
        self.ip_adapter = self.sliced = False

    def enable(self, reuse: Reuse | None) -> None:
        attnreuse.disable(self.pipe)
        self.session = self.reuse = None
        if reuse is not None:
            given = {"layers": reuse.layers, "map_format": reuse.map_format}
            with contextlib.suppress(attnreuse.UnsupportedLayerError):  # every layer has another tool's processor
                self.session = attnreuse.enable(self.pipe, reuse.policy(), **given)
                self.reuse = reuse

    def set_lora(self, seed: int | None) -> None:
        if self.lora is not None:
            self.pipe.unload_lora_weights()
        if seed is not None:
            self.pipe.load_lora_weights(lora_state(seed), adapter_name=f"a{seed}")
        self.lora = seed

    def set_ip_adapter(self, on: bool) -> None:
        if on and not self.ip_adapter:
            state = ip_adapter_state(self.pipe.unet)
            self.pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
        elif self.ip_adapter and not on:
            self.pipe.unload_ip_adapter()
        self.ip_adapter = on

    def set_sliced(self, on: bool) -> None:
        if on != self.sliced:
            self.pipe.enable_attention_slicing(1) if on else self.pipe.disable_attention_slicing()
        self.sliced = on

    def request(self, r: random.Random) -> Request:
        """A run drawn for the state that the pipeline is in; half of them fit the policy."""
        scheduler, steps = r.choice(SCHEDULERS), r.choice([3, 4, 5])
        strength = r.choice([None, None, None, 0.5, 0.8])
        if self.reuse is not None and r.random() < 0.7:
            scheduler, steps, strength = r.choice(SCHEDULERS[:3]), self.reuse.steps, None
        own_loop = not self.ip_adapter and r.random() < 0.2
        strength = None if own_loop else strength
        size = r.choice([(16, 16), (16, 16), (24, 16)])
        return Request(
            steps, scheduler, strength, size, r.choice([1, 1, 2]), r.choice([7, 7, 9]), r.choice([1.0, 5.0, 5.0]),
            r.randrange(3), self.reuse, self.lora, self.ip_adapter, self.sliced, own_loop,
        )  # fmt: skip

    def run(self, request: Request, stop: tuple[str, int] | None = None) -> torch.Tensor:
        """The latents of a run; raises :class:`StoppedError` or KeyboardInterrupt where it is stopped."""
        if request.own_loop:
            return self._own_loop(request, stop)
        pipe = self.pipe if request.strength is None else self.sibling
        pipe.scheduler = getattr(diffusers, request.scheduler).from_config(pipe.scheduler.config)
        g = torch.Generator().manual_seed(request.seed)
        names = ("prompt_embeds", "negative_prompt_embeds")
        given = {name: torch.randn(request.batch, request.tokens, WIDTH, generator=g) for name in names}
        if self.ip_adapter:
            rows = 2 if request.guidance > 1 else 1
            given["ip_adapter_image_embeds"] = [torch.randn(rows * request.batch, 1, WIDTH, generator=g)]
        if request.strength is None:
            given["height"], given["width"] = request.size
        else:
            given["image"] = torch.rand(request.batch, 3, *request.size, generator=g)
            given["strength"] = request.strength
        undo = self._stopping(pipe, given, *stop) if stop else None
        generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.batch)]
        try:
            return pipe(
                num_inference_steps=request.steps, guidance_scale=request.guidance, generator=generators,
                output_type="latent", **given,
            ).images  # fmt: skip
        finally:
            if undo is not None:
                undo()

    @torch.no_grad()
    def _own_loop(self, request: Request, stop: tuple[str, int] | None) -> torch.Tensor:
        scheduler = getattr(diffusers, request.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(request.steps)
        g = torch.Generator().manual_seed(request.seed)
        x = torch.randn(request.batch, 4, request.size[0] // 2, request.size[1] // 2, generator=g)
        contexts = torch.randn(1 if request.guidance == 1 else 2, request.batch, request.tokens, WIDTH, generator=g)
        for i, t in enumerate(scheduler.timesteps):
            if stop is not None and i > stop[1]:
                raise StoppedError  # given up: nobody tells the session
            noises = [self.pipe.unet(scheduler.scale_model_input(x, t), t, context).sample for context in contexts]
            noise = noises[0] if len(noises) == 1 else noises[0] + request.guidance * (noises[1] - noises[0])
            extra = {} if request.scheduler.startswith("Heun") else {"generator": g}
            x = scheduler.step(noise, t, x, **extra).prev_sample
        return x

    def _stopping(self, pipe, given: dict, place: str, step: int):
        """Have the run stopped; returns what undoes it."""
        calls = [0]

        def fail(*args, **kwargs):
            calls[0] += 1
            if calls[0] > step:
                raise StoppedError

        def callback(pipe, i, t, kwargs):
            if i >= step:
                if place == "interrupt flag":
                    pipe._interrupt = True
                    return kwargs
                raise KeyboardInterrupt if place == "interrupt key" else StoppedError
            return kwargs

        if place == "denoiser":
            return pipe.unet.mid_block.register_forward_pre_hook(fail).remove
        if place == "scheduler":
            original = pipe.scheduler.step
            pipe.scheduler.step = lambda *args, **kwargs: fail() or original(*args, **kwargs)
            return lambda: pipe.scheduler.__dict__.pop("step")
        given["callback_on_step_end"] = callback
        return None

    def act(self, r: random.Random) -> tuple[str, Request | None, torch.Tensor | None]:
        """One act drawn by `r`: its name, and for a complete run the request and the latents."""
        kind = r.choices(
            [
                "run",
                "stopped run",
                "run in a thread",
                "run compiled",
                "run within a run",
                "enable",
                "disable",
                "lora",
                "ip-adapter",
                "slicing",
            ],
            [10, 4, 2, 0.1, 0.7, 3, 0.7, 0.6, 0.4, 0.4],
        )[0]
        if kind == "enable":
            steps = r.choice([4, 5])
            layers, map_format = r.choice(["self", "all", "cross"]), r.choice(["u8", "u4", "fp32"])
            self.enable(Reuse(steps, r.choice([1, 2]), r.random() < 0.5, layers, map_format))
        elif kind == "disable":
            self.enable(None)
        elif kind == "lora":
            self.set_lora(r.choice([None, 1, 2]))
        elif kind == "ip-adapter" and not self.sliced:  # diffusers cannot load one into sliced layers
            self.set_ip_adapter(not self.ip_adapter)
        elif kind == "slicing" and not self.ip_adapter:
            self.set_sliced(not self.sliced)
        elif kind == "stopped run":
            place = r.choice(PLACES)
            with contextlib.suppress(StoppedError, KeyboardInterrupt, attnreuse.PolicyMismatchError):
                self.run(self.request(r), (place, r.randrange(4)))
            return f"stopped: {place}", None, None
        elif kind.startswith("run"):
            return self._compared(kind, self.request(r))
        return kind, None, None

    def _compared(self, kind: str, request: Request) -> tuple[str, Request, torch.Tensor | None]:
        outs: list[torch.Tensor | None] = []

        def run() -> None:
            try:
                outs.append(self.run(request))
            except attnreuse.PolicyMismatchError:
                outs.append(None)  # the policy is for the steps asked for, not those executed

        if kind == "run in a thread":
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        elif kind == "run compiled":
            torch._dynamo.reset()  # graphs of earlier lives count towards its limit
            self.pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
            run()
            for module in self.pipe.unet.modules():
                module._compiled_call_impl = None
        elif kind == "run within a run":  # the outer one's state must not reach the inner one
            self._within(request, run)
        else:
            run()
        return kind, request, outs[0]

    def _within(self, inner: Request, run) -> None:
        outer = dataclasses.replace(inner, seed=inner.seed + 7, own_loop=False, strength=None)
        original, done = self.pipe.scheduler, []

        def callback(pipe, i, t, kwargs):
            if i == 1 and not done:
                done.append(1)
                mine = pipe.scheduler
                run()
                pipe.scheduler = mine
            return kwargs

        def call(*args, **kwargs):
            return type(self.pipe).__call__(self.pipe, *args, callback_on_step_end=callback, **kwargs)

        life = Life.__new__(Life)
        life.__dict__ = {**self.__dict__, "pipe": _Calling(self.pipe, call)}
        with contextlib.suppress(attnreuse.PolicyMismatchError):
            life.run(outer)
        self.pipe.scheduler = original
        if not done:
            run()


class _Calling:
    """A pipeline that is called by another function."""

    def __init__(self, pipe, call):
        self.__dict__.update(_pipe=pipe, _call=call)

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def __setattr__(self, name, value):
        setattr(self._pipe, name, value)

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)


def digest(latents: torch.Tensor | None) -> str:
    return "refused" if latents is None else hashlib.sha256(latents.numpy().tobytes()).hexdigest()


def fresh(request: Request) -> str:
    """The digest of that run on a pipeline that nothing else was done to."""
    life = Life()
    life.enable(request.reuse)  # first: no layer could be served once all are sliced
    life.set_lora(request.lora)
    life.set_ip_adapter(request.ip_adapter)
    life.set_sliced(request.sliced)
    return digest(life._compared("run", request)[2])


class FreshProcesses:
    """Runs requests in processes that have run nothing; results are kept."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).resolve()), "--server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, text=True, cwd=Path(__file__).parent, **pipes)
        self._known: dict[Request, str] = {}

    def __call__(self, request: Request) -> str:
        if request not in self._known:
            self._server.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
            self._server.stdin.flush()
            self._known[request] = self._server.stdout.readline().strip()
        return self._known[request]

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(30)

    def __len__(self) -> int:
        return len(self._known)


def serve() -> None:
    """Answer requests on standard input, each from a forked process."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        data = json.loads(line)
        data["reuse"] = data["reuse"] and Reuse(**data["reuse"])
        data["size"] = tuple(data["size"])
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                print(fresh(Request(**data)), flush=True)
        except BaseException:
            print(traceback.format_exc().replace("\n", " | "), flush=True)
        os._exit(0)


def maps_alive() -> int:
    """Bytes of maps that anything still holds."""
    gc.collect()
    return sum(ring.nbytes for ring in gc.get_objects() if isinstance(ring, MapRing))


def live(acts: int, seed: int, alone: FreshProcesses, progress=lambda done, counts: None) -> dict[str, int]:
    """`acts` acts on one pipeline; how often each was done. AssertionError where a run differs or maps stay."""
    r, life, counts, unchecked = random.Random(seed), Life(), collections.Counter(), 0
    history = collections.deque(maxlen=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for done in range(acts):
            kind, request, latents = life.act(r)
            counts[kind] += 1
            history.append((kind, request))
            if request is not None:
                expected = alone(request)
                assert digest(latents) == expected, f"act {done} of seed {seed}: {expected}; before: {list(history)}"
                counts["reused"] += bool(life.reuse and life.session.report().layers[0].reused)
            unchecked += 1
            if unchecked > 50 and request is not None and not request.own_loop:  # such a loop may be under way still
                unchecked = 0
                assert maps_alive() == 0, f"act {done} of seed {seed}: {list(history)}"
            progress(done, counts)
        attnreuse.disable(life.pipe)
        assert maps_alive() == 0, f"after disable, seed {seed}"
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--acts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.server:
        serve()
        return
    begin, alone, memory = time.time(), FreshProcesses(), {}

    def progress(done: int, counts: dict[str, int]) -> None:
        if done % max(1, args.acts // 20) == 0:
            memory[done] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
            print(f"{done} acts, {time.time() - begin:.0f} s, {memory[done]:.0f} MiB", flush=True)

    counts = live(args.acts, args.seed, alone, progress)
    alone.close()
    print(json.dumps({"seed": args.seed, **counts, "runs of fresh processes": len(alone), "resident MiB": memory}))


if __name__ == "__main__":
    main()
