"""What users read is plain English: help texts are sentences, and no text has the riddles that were once in it."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gm_probe.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks", "benchmarks/results", "benchmarks/results/peers")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md")))]
RIDDLES = re.compile(
    r"""told\ from\ (0|it|each)\b | \bis\ told\b | nothing\ is\ told | tells?\ neither | cannot\ be\ told\ from
    | \berrs?\ [\d.]+\ points | \berrs\ (about|more|less|at) | what\ was\ found\ to\ hold
    | \bhangs?\ (on|together)\b | \bstrangers?\b | beside\ other\ work | \bin\ a\ row\b | \blikewise\b
    | of\ so\ many\b | canary\ sings | \bare\ dear\b | is\ there\ twice | whatever\ the\ labels
    | chang(es|ing)\ no\ figure | no\ figure\ changes | NT-Xent\ figures | conservative\ figure
    | the\ figures\ (are\ kept|above)
    | with\ what\ its\ text\ has\ lost | what\ is\ not\ given\ here | other\ way\ round""",
    re.IGNORECASE | re.VERBOSE,
)
DEFAULT = re.compile(r"\s*\[default: .*\]$")
LONGEST = 25


def commands() -> list[tuple[str, click.Command]]:
    context = click.Context(cli, info_name="gmprobe")
    return [("gmprobe", cli), *((name, cli.get_command(context, name)) for name in COMMANDS)]


def option_helps(command: click.Command) -> Iterator[tuple[str, str]]:
    """The names of a command's options, and their help without the default."""
    for option in command.params:
        if isinstance(option, click.Option):
            yield "/".join(option.opts), DEFAULT.sub("", option.help or "")


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.;:?])\s+", " ".join(text.split()))


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of each string of a module that is no docstring; what an f-string fills in is …."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(map(id, ast.walk(node)))
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def prose(page: Path) -> str:
    """The page without its blocks of code and its comments."""
    return re.sub(
        r"^```.*?^```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize(("name", "command"), commands())
def test_help_texts_are_sentences(name: str, command: click.Command) -> None:
    odd = [
        f"{option}: {text}"
        for option, text in option_helps(command)
        if not (text[:1].isupper() and text.endswith("."))
    ]
    paragraphs = [paragraph.strip() for paragraph in (command.help or "").split("\n\n")]
    odd += [
        text
        for text in paragraphs
        if text[0] != "\b" and not (text[0].isupper() and text.endswith((".", ":")))
    ]
    assert not odd, name


@pytest.mark.parametrize(("name", "command"), commands())
def test_sentences_of_options_are_short(name: str, command: click.Command) -> None:
    texts = [text for _, text in option_helps(command)]
    assert not [part for text in texts for part in sentences(text) if len(part.split()) > LONGEST], name


def test_short_helps_are_sentences() -> None:
    assert not [text for text in COMMANDS.values() if not (text[0].isupper() and text.endswith("."))]


@pytest.mark.parametrize(("name", "command"), commands())
def test_no_help_is_a_riddle(name: str, command: click.Command) -> None:
    texts = [COMMANDS.get(name, ""), command.help or "", *(text for _, text in option_helps(command))]
    assert not [text for text in texts if RIDDLES.search(text)]


def test_no_message_is_a_riddle() -> None:
    modules = sorted((ROOT / "gm_probe").rglob("*.py"))
    assert len(modules) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in modules
        for line, text in strings(path)
        if RIDDLES.search(text) and path.name != "errors.py"  # a pattern of torch's errors has comments
    ]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_a_riddle(page: Path) -> None:
    text = " ".join(prose(page).split())
    assert not [text[max(0, m.start() - 60) : m.end() + 60] for m in RIDDLES.finditer(text)]


def test_no_recipe_is_a_riddle() -> None:
    recipes = sorted((ROOT / "gm_probe" / "recipes").rglob("*.toml"))
    assert recipes
    assert not [
        (path.name, m[0]) for path in recipes if (m := RIDDLES.search(str(tomllib.loads(path.read_text()))))
    ]


@pytest.mark.parametrize(
    "text",
    [
        "none is told from 0",
        "IAM-D errs 2.4 points less",
        "outputs hang on the batch",
        "a stranger's file",
        "Likewise.",
    ],
)
def test_a_riddle_is_found(text: str) -> None:
    assert RIDDLES.search(text)
