"""One adapter per family of denoisers: which modules attend, of which kind, and how."""

from attnreuse.adapters import unets
from attnreuse.adapters.adapter import Adapter, adapter_of, parameters, parts, register
from attnreuse.adapters.flux import Flux
from attnreuse.adapters.forms import Form, Inputs, Query
from attnreuse.adapters.pixart import PixArt
from attnreuse.adapters.sd3 import SD3

__all__ = ["Adapter", "Form", "Inputs", "Query", "adapter_of", "parameters", "parts", "register"]

for adapter in (
    unets.UNet(),
    unets.Unconditional(),
    unets.AnimateDiff(),
    unets.VideoUNet(),
    unets.SpatioTemporalUNet(),
    unets.AudioLDM2(),
    unets.Kandinsky3(),
    unets.DreamLite(),
    PixArt(),
    SD3(),
    Flux(),
):
    register(adapter)
