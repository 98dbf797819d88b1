"""A pipeline without its weights, from its configs alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from attnreuse.adapters import Adapter, adapter_of, parts
from attnreuse.errors import UnsupportedLayerError
from attnreuse.measure.environment import free_bytes
from attnreuse.planning.samplers import make_scheduler
from attnreuse.study.setting import not_of_prompts

NOT_CALLED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that a plain run does without
FRAMES = 16  # of models whose configs name no number
FILLED = 0.8  # of the free memory, at most, by weights
LATENTS = 128  # along a side, of models whose configs name no size: 1024 pixels


def class_of(index: dict[str, Any]) -> tuple[str, type | None]:
    """The name of a pipeline's class, and the class where it is one of diffusers."""
    import diffusers

    name = index.get("_class_name")
    name = str(name[-1] if isinstance(name, (list, tuple)) else name)  # [file, class] where it is its own
    return name, getattr(diffusers, name, None)


@dataclass
class Blueprint:
    """A pipeline's denoiser on the meta device, its scheduler, and sizes.

    Attributes:
        model: folder or hub name.
        local: read files that are here, ask no hub.
        index: its parts and their classes.
        adapter: of the denoiser.
        vae_scale: pixels per latent, along a side.
        tokens: of a prompt.
        bins: of a spectrogram's frame, where the pipeline makes sound of spectrograms.
    """

    model: str
    local: bool
    index: dict[str, Any]
    denoiser: Any
    adapter: Adapter
    scheduler: Any
    vae_scale: int
    tokens: int
    bins: int | None = None

    @classmethod
    def load(
        cls,
        model: str,
        scheduler: str | None = None,
        local: bool = False,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
    ) -> Blueprint:
        """Read the configs of a pipeline folder or hub name.

        Args:
            scheduler: as in :func:`make_scheduler`.
            local: ask no hub.
            size, frames: of the runs that are planned, for what is said of a model that is not served.

        Raises:
            UnsupportedLayerError: its denoiser is not served; the message says why.
        """
        import diffusers

        index = diffusers.DiffusionPipeline.load_config(model, local_files_only=local)
        part = next((name for name in parts() if index.get(name, [None, None])[1]), None)
        if part is None:
            raise UnsupportedLayerError(
                f"{model}: expected a pipeline with a {' or '.join(parts())}, got {sorted(index)}"
            )

        def config(name: str, reader: Any = diffusers.AutoencoderKL) -> dict[str, Any]:
            return reader.load_config(model, subfolder=name, local_files_only=local)

        def present(*names: str) -> str | None:
            return next((name for name in names if index.get(name, [None, None])[1]), None)

        made_by = getattr(diffusers, index[part][1], None)
        if made_by is None:
            raise UnsupportedLayerError(f"{model}: diffusers has no {index[part][1]}")
        with torch.device("meta"):
            denoiser = made_by.from_config(config(part)).eval().to("meta")  # some parts ignore the context
        adapter, vae, text = adapter_of(denoiser, size, frames), present("vae", "movq"), present("text_encoder")
        tokens = adapter.tokens
        if tokens is None:
            known = config(text) if text else {}
            tokens = known.get("max_position_embeddings") or known.get("text_config", {}).get(
                "max_position_embeddings", 77
            )
        vocoder = present("vocoder")
        sampler = present("scheduler") or next(name for name in index if "scheduler" in name)
        return cls(
            model=model,
            local=local,
            index=index,
            denoiser=denoiser,
            adapter=adapter,
            scheduler=make_scheduler(config(sampler, diffusers.DDIMScheduler), scheduler),
            vae_scale=2 ** (len(config(vae)["block_out_channels"]) - 1) if vae else 1,
            tokens=tokens,
            bins=config(vocoder)["model_in_dim"] if vocoder else None,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the model's own pictures; frames and bins of its spectrograms."""
        size = self.denoiser.config.get("sample_size") or LATENTS
        side = (size if isinstance(size, int) else max(size)) * self.vae_scale
        return side, self.bins or side

    @property
    def frames(self) -> int:
        """Of the model's own videos."""
        return self.denoiser.config.get("num_frames") or FRAMES

    def rows(self, guidance: bool) -> int:
        """Of the denoiser's batch for each picture, with or without classifier-free guidance."""
        name, cls = class_of(self.index)
        guided = guidance and (cls is None or "guidance_scale" in inspect.signature(cls.__call__).parameters)
        return self.adapter.rows(self.denoiser, name, guided)

    @property
    def beside(self) -> str | None:
        """The pipeline's class, where it shows the model a picture it is given beside the one it makes."""
        name, _ = class_of(self.index)
        return name if name in self.adapter.beside else None

    def inputs(self, size: tuple[int, int], batch: int, frames: int = 1) -> dict[str, Any]:
        """Arguments of the denoiser's forward for pictures of `size` (height, width), on meta."""
        latents = self.adapter.latents(self.denoiser, size, self.vae_scale)
        return self.adapter.inputs(self.denoiser, batch, latents, self.tokens, frames)

    def with_random_weights(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The pipeline of these configs; nothing but its tokenizers' files is read.

        Raises:
            UnsupportedLayerError: it cannot be made so.
        """
        name, cls = class_of(self.index)
        if cls is None:
            raise UnsupportedLayerError(f"{self.model}: diffusers has no {name}")
        taken = inspect.signature(cls.__init__).parameters
        parts = {name: value for name, value in self.index.items() if name in taken}
        for name, made_by in parts.items():
            if isinstance(made_by, (list, tuple)):
                parts[name] = None if name in NOT_CALLED or made_by[1] is None else self._part(name, *made_by)
        if "requires_safety_checker" in taken:
            parts["requires_safety_checker"] = False
        pipe = cls(**parts).to(device, dtype)
        pipe.scheduler = self.scheduler
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def not_timed(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why no run of it can be timed on `device`; None where one can."""
        if self.adapter.makes_videos or self.bins:
            return "only pipelines of pictures are timed"
        name, cls = class_of(self.index)
        reason = f"diffusers has no {name}" if cls is None else not_of_prompts(cls)
        if reason is not None:
            return reason
        free, weights = free_bytes(device), self.parameters() * dtype.itemsize
        if free is not None and weights > FILLED * free:
            return f"its weights take {weights / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free here"
        return None

    def parameters(self) -> int:
        """How many numbers its models hold."""
        made_by = {n: of for n, of in self.index.items() if n[0] != "_" and isinstance(of, (list, tuple)) and of[1]}
        count = 0
        for name, (library, cls_name) in made_by.items():
            if name not in NOT_CALLED and not cls_name.endswith(("Scheduler", "Tokenizer", "TokenizerFast")):
                with torch.device("meta"):
                    count += sum(p.numel() for p in self._part(name, library, cls_name).parameters())
        return count

    def _part(self, name: str, library: str, cls_name: str) -> Any:
        import diffusers
        import transformers

        given = {"subfolder": name, "local_files_only": self.local}
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), cls_name, None)
        if cls is None:
            raise UnsupportedLayerError(
                f"{self.model}: its {name} is a {cls_name} of {library}, which is not at hand; --no-measure plans it"
            )
        if library == "diffusers":
            return cls.from_config(cls.load_config(self.model, **given))
        if not hasattr(cls, "config_class"):  # a tokenizer
            return cls.from_pretrained(self.model, **given)
        return cls(cls.config_class.from_pretrained(self.model, **given)).eval()
