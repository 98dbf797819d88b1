"""Triton kernels of capture and reuse; installs as `attnreuse.kernels`.

`backend.py` is their door (it imports triton only when called), `capture.py`, `reuse.py` and `direct.py`
(reuse of u7 maps) hold the kernels, `tiles.py` what they share, `configs.py` how they are launched.
"""
