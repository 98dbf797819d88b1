"""Reuse beside fewer steps and other caches, at equal measured latency."""
