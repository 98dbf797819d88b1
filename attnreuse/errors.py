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
    """Under ``strict``: a layer holds no map of this run that it could reuse, where its policy reuses."""


class UnknownStepError(AttnReuseError):
    """Under ``strict``: which step a denoiser call belongs to cannot be told."""
