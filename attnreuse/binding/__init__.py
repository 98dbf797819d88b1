"""Reuse in a model that somebody else wrote: which layers, at which step of which run, and what they are told to do."""
