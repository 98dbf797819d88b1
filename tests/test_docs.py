"""What the README and the pages of docs/ tell users to write, run or read: snippets, options, names and links."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import attnreuse
from attnreuse.binding.denoiser import select_layers
from attnreuse.binding.shapes import parse_bytes
from attnreuse.cli import app
from attnreuse.maps.formats import format_named

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page):
    return page.read_text(encoding="utf-8")


def snippets(language):
    """Fenced code of a language, with the page that it stands in."""
    found = [(page, code) for page in PAGES for kind, code in FENCED.findall(text_of(page)) if kind == language]
    return [pytest.param(code, id=f"{page.name}-{i}") for i, (page, code) in enumerate(found)]


def commands():
    """Command lines of `attnreuse` in fenced and inline code."""
    for page in PAGES:
        text = text_of(page)
        fenced = "\n".join(code for kind, code in FENCED.findall(text) if kind == "bash").replace("\\\n", " ")
        inline = re.findall(r"`(attnreuse [^`]+)`", re.sub(r"\n *", " ", FENCED.sub("", text)))
        for line in [*re.findall(r"(?:^|&& )(attnreuse .*)", fenced, re.MULTILINE), *inline]:
            if "..." not in line:
                yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.name}: {line}")


def what_you_write():
    """The Python expressions in the second column of the README's table of uses; options as those of `enable`."""
    table = text_of(ROOT / "README.md").partition("| you want |")[2].partition("\n\n")[0]
    cells = " ".join(line.split("|")[2] for line in table.splitlines()[2:])
    name = ""
    for code in re.findall(r"`([^`]+)`", cells):
        if re.match(r"[\w.]+\(", code):
            yield code
        elif not code.startswith("attnreuse "):
            option, _, value = code.rpartition("=")
            name = option or name  # a bare value is of the option before
            yield f"enable(pipe, {name}={value})"


@pytest.mark.parametrize("code", snippets("python"))
@pytest.mark.filterwarnings("error:attnreuse")  # whatever we would say of it
def test_snippets_run(code, capsys):
    exec(compile(code, "snippet", "exec"), {})
    assert "10" in capsys.readouterr().out.split()  # calls that reuse, in a report


@pytest.mark.parametrize("arguments", list(commands()))
def test_commands_have_these_options(arguments):
    group = typer.main.get_command(app)
    name, *rest = arguments
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    group.commands[name].make_context(name, rest, resilient_parsing=rest == ["--help"])


def check_option(name, value):
    """An option of `enable`, by what it is checked with there."""
    if name == "map_format":
        format_named(value)
    elif name == "memory_budget":
        assert parse_bytes(value) > 0
    elif name == "layers":
        kinds = {"up_blocks.0.attn1": "self", "up_blocks.0.attn2": "cross"}
        assert select_layers(kinds, value)
    elif name == "fit":
        assert value in ("exact", "stretch")


@pytest.mark.parametrize("code", list(what_you_write()))
def test_what_you_write_exists(code):
    call = ast.parse(code, mode="eval").body
    if isinstance(call, ast.Attribute):  # of its result
        call = call.value
    if isinstance(call.func, ast.Attribute):
        assert hasattr(attnreuse.Policy, call.func.attr)
        return
    function = getattr(attnreuse, call.func.id)
    assert {keyword.arg for keyword in call.keywords} <= inspect.signature(function).parameters.keys()
    for keyword in call.keywords if call.func.id == "enable" else ():
        if not isinstance(keyword.value, ast.Name):
            check_option(keyword.arg, ast.literal_eval(keyword.value))
    if call.func.id in ("hurry", "periodic", "Policy"):
        eval(code, {call.func.id: function})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page)):
        assert re.match(r"https?:", target) or (page.parent / target).exists(), target
