"""What the README and the pages of docs/ tell users to write, run or read: snippets, options, names and links."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import attnreuse
from attnreuse.cli import app

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
    """The Python expressions in the second column of the README's table of uses."""
    table = text_of(ROOT / "README.md").partition("| you want |")[2].partition("\n\n")[0]
    cells = " ".join(line.split("|")[2] for line in table.splitlines()[2:])
    return [code for code in re.findall(r"`([^`]+)`", cells) if not code.startswith("attnreuse ")]


@pytest.mark.parametrize("code", snippets("python"))
@pytest.mark.filterwarnings("error:attnreuse")  # whatever we would say of it
def test_snippets_run(code, capsys):
    exec(compile(code, "snippet", "exec"), {})
    assert "10" in capsys.readouterr().out  # calls that reuse, in a report


@pytest.mark.parametrize("arguments", list(commands()))
def test_commands_have_these_options(arguments):
    group = typer.main.get_command(app)
    name, *rest = arguments
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    group.commands[name].make_context(name, rest, resilient_parsing=rest == ["--help"])


@pytest.mark.parametrize("code", what_you_write())
def test_what_you_write_exists(code):
    if not re.match(r"[\w.]+\(", code):  # options, or values of the option before
        code = f"enable(pipe, {code})" if "=" in code else f"enable(pipe, {{}}, layers={code})"
    call = ast.parse(code, mode="eval").body
    if isinstance(call, ast.Attribute):  # of its result
        call = call.value
    if isinstance(call.func, ast.Attribute):
        assert hasattr(attnreuse.Policy, call.func.attr)
        return
    function = getattr(attnreuse, call.func.id)
    parameters = inspect.signature(function).parameters
    assert {keyword.arg for keyword in call.keywords} <= parameters.keys()
    if call.func.id in ("hurry", "periodic", "Policy"):
        eval(code, {call.func.id: function})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page)):
        assert re.match(r"https?:", target) or (page.parent / target).exists(), target
