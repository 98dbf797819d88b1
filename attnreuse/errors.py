"""What attnreuse raises beyond ValueError and TypeError."""


class AttnReuseError(RuntimeError):
    """Base of the library's own errors."""


class UnsupportedLayerError(AttnReuseError):
    """A layer, processor or model that attnreuse cannot serve."""


class PolicyMismatchError(AttnReuseError):
    """A policy that does not fit the run: other step count, scheduler, model or layers."""


class MemoryBudgetError(AttnReuseError):
    """A memory budget in which not even one layer's map fits."""


class StaleMapError(AttnReuseError):
    """A step would reuse a map that this run did not capture for it."""
