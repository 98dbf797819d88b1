"""Makes `python -m benchmarks.gpu` see what `python benchmarks/gpu.py` sees: the installed package first."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
sys.path[:] = [str(_HERE), *(p for p in sys.path if Path(p).resolve() != _ROOT), str(_ROOT)]
