"""One adapter per family of denoisers: which modules attend, of which kind, and how."""

from attnreuse.adapters import unets
from attnreuse.adapters.adapter import Adapter, adapter_of, parts, register
from attnreuse.adapters.forms import Form, Inputs, Query

__all__ = ["Adapter", "Form", "Inputs", "Query", "adapter_of", "parts", "register"]

for adapter in (
    unets.UNet(),
    unets.AnimateDiff(),
    unets.VideoUNet(),
    unets.SpatioTemporalUNet(),
    unets.Kandinsky3(),
    unets.DreamLite(),
):
    register(adapter)
