"""What installs: the extension, the kernels' package, a light import, no cycle of imports."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnreuse
from attnreuse import native

PACKAGE = Path(attnreuse.__file__).parent
# Imports point one way: a module may import only those before it.
LAYERS = [
    {
        "errors",
        "environment",
        "timing",
        "tiny_shapes",
        "loops",
        "conditions",
        "rows",
        "levels",
        "samplers",
        "progress",
    },
    {"noise", "hub"},
    {"formats", "policy", "caption_oracle", "clock", "guard"},
    {"reference", "native", "kernels", "ring", "metrics", "report", "schedule"},
    {"ops", "run"},
    {"processors"},
    {"denoiser", "bench"},
    {"planner", "layers"},
    {"compiled"},
    {"session"},
    {"evaluate"},
    {"costs", "peers"},
    {"forecast", "sampling"},
    {"search", "analysis"},
    {"compare", "front"},
    {"plots"},
    {"page"},
    {"cli"},
    {"__main__"},
]


def imports_of(path):
    """attnreuse modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attnreuse"):
            _, _, module = node.module.partition(".")
            found |= {module.partition(".")[0]} if module else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    files = [(path.stem, path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    files += [("cli", path) for path in (PACKAGE / "cli").glob("*.py")]
    for name, path in files:
        for imported in imports_of(path) & rank.keys():
            assert rank[imported] < rank[name] or imported == name == "cli", f"{name} imports {imported}"


def test_importing_attnreuse_does_not_import_diffusers():
    code = "import sys, attnreuse; print([m for m in ('diffusers', 'transformers', 'triton') if m in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert made.stdout.strip() == "[]"


def test_policies_know_no_tensors():
    code = "import sys, types; sys.modules['torch'] = None; package = types.ModuleType('attnreuse')\n"
    code += f"package.__path__ = [r'{PACKAGE}']; sys.modules['attnreuse'] = package\n"
    code += "from attnreuse import policy, schedule; print(policy.hurry(4, 2, None).reuse)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "(False, False, True, True)"


def test_kernels_install_under_attnreuse_and_shadow_nothing():
    import attnreuse.kernels

    assert "Triton" in attnreuse.kernels.__doc__
    made = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd="/")
    assert "attnreuse" not in made.stdout + made.stderr


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: the extension is optional")
def test_the_extension_was_built():
    assert native.extension is not None, native.INFO
    assert native.INFO.startswith(("gcc", "clang", "msvc"))
    assert isinstance(native.extension.cuda_devices(), list)


def test_a_missing_extension_is_said_not_fatal():
    code = "import sys; sys.modules['attnreuse._native'] = None; from attnreuse import native, ops; import torch\n"
    code += "q = torch.ones(1, 1, 2, 4); ops.capture(q, q, q); print(native.INFO)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert made.stdout.startswith("not built: ")
