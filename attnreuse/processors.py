"""Public path of :mod:`attnreuse.binding.processors`."""

from attnreuse.binding.processors import ReuseAttnProcessor, attention_layers

__all__ = ["ReuseAttnProcessor", "attention_layers"]
