"""Triton kernels of capture and reuse; installs as `attnreuse.kernels`.

`backend.py` is their door (it imports triton only when called), `capture.py` and `reuse.py` hold a
kernel each, `tiles.py` what both share, `configs.py` how they are launched.
"""
