"""What installs: the extension, the kernels' package, a light import, no cycle of imports."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnreuse
from attnreuse import native

PACKAGE = Path(attnreuse.__file__).parent


def test_imports_point_one_way():
    """The contracts of pyproject.toml, by import-linter."""
    made = subprocess.run(["lint-imports"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert made.returncode == 0, made.stdout


def loaded_after(code):
    code += "\nimport sys; print([m for m in ('torch', 'diffusers', 'transformers', 'triton') if m in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    return made.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("from attnreuse import enable", "['torch']"),
        ("import attnreuse; print(attnreuse.hurry(4, 2), attnreuse.__version__, attnreuse.load_policy)", "[]"),
        ("from attnreuse.binding import schedule", "[]"),
        ("import attnreuse.cli", "[]"),
    ],
)
def test_what_is_imported_loads_no_more_than_it_needs(code, loaded):
    assert loaded_after(code) == loaded


def test_every_public_name_is_there():
    for name in attnreuse.__all__:
        assert getattr(attnreuse, name) is not None
    assert set(attnreuse.__all__) <= set(dir(attnreuse))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        attnreuse.nothing  # noqa: B018


def test_the_sources_alone_say_what_to_do(tmp_path):
    """Without an editable install, Python started in a clone finds the sources before the installed package."""
    shutil.copytree(
        Path(__file__).parents[1] / "attnreuse", tmp_path / "attnreuse", ignore=lambda *_: ["assets", "kernels"]
    )
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import attnreuse"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "start Python in another folder, or install with pip install -e ." in made.stderr


def test_every_room_is_installed():
    """setup.py finds packages by their `__init__.py`; the installed ones are tested wherever tests import them."""
    source = Path(__file__).parents[1] / "attnreuse"
    rooms = {path.parent for path in source.rglob("*.py")}
    assert len(rooms) > 10
    assert not [room for room in rooms if not (room / "__init__.py").exists()]
    assert not [room for room in rooms if not (PACKAGE / room.relative_to(source)).is_dir()]


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
