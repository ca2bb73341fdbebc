"""README and docs/ are true: every block of commands and of Python runs, every link leads somewhere.

A page is worked off block by block in one folder of its own. A comment right before a block says what to add to its
commands to make them short (``run with: OPTIONS``), or why it is not run (``not run: REASON``).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
import torchvision
import yaml
from command_line import run
from PIL import Image
from torch import nn

import gm_probe
from gm_probe import errors
from gm_probe.cli import cli, main
from gm_probe.data.normalization import Normalization
from gm_probe.models.checkpoints import save_checkpoint
from gm_probe.models.zoo import ModelSpec, build_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_BY_CI = {"quickstart": "run by .ci/run", "tests": "run by .ci/run"}
BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
FILE = re.compile(r"# (\S+\.(?:py|toml))\n")
RECIPE = """
[base]
model = "mlp-8"
num_train = 60
num_unlabeled = 30
num_test = 60
epochs = 1
[grid]
lr = [0.05, 0.2]
weight_decay = [0.0, 0.01]
seed = [0, 1]
[measure]
measures = ["local_inconsistency", "fisher_trace"]
"""


class Block(NamedTuple):
    """A fenced block: its kind, its text, what the comment before it says, and where it stands."""

    kind: str
    text: str
    note: str
    where: str

    @property
    def not_run(self) -> str:
        """Why it is not run; empty where it is."""
        return RUN_BY_CI.get(self.note, self.note.partition("not run: ")[2])

    @property
    def added(self) -> list[str]:
        return shlex.split(self.note.partition("run with: ")[2])


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            m["kind"],
            m["text"],
            m["note"] or "",
            f"{page.name}:{text.count(chr(10), 0, m.start('kind')) + 1}",
        )
        for m in BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def perform(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`gmprobe …`, perhaps with `> FILE` at its end, in this process."""
    assert words[0] == "gmprobe", f"no way to run {words[0]}; mark the block as not run"
    words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
    code, out, err = run(words[1:], capsys)
    assert code == 0, f"{shlex.join(words)}\n{err}"
    if target:
        Path(target).write_text(out, encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all that the pages speak of, tiny: data/, checkpoints, theirs.csv, recipe.toml, runs/ and a run in it."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 12)):
        for name, low in (("bright", 150), ("dark", 0)):
            (folder / "data" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / part / name / f"{index}.png")
    torch.manual_seed(0)
    spec = ModelSpec("mlp-4", (3, 32, 32), 2)
    save_checkpoint(folder / "ckpt.pt", build_model(spec), spec, Normalization(), ("bright", "dark"))
    resnet = torchvision.models.resnet18(num_classes=2).state_dict()
    torch.save(resnet, folder / "resnet.pth")
    torch.save({"model": resnet, "model_ema": resnet}, folder / "ema.pt")
    rows = [f"{0.1 + i / 50:.3f},{rng.normal() + i},{0.1 * (i % 3)}" for i in range(12)]
    (folder / "theirs.csv").write_text("\n".join(["error_gap,sharpness,lr", *rows]))
    (folder / "recipe.toml").write_text(RECIPE)
    with contextlib.chdir(folder):
        main(["sweep", "recipe.toml", "--out", "runs", "-q"])
        small = ["--model", "mlp-8", "--num-train", "60", "--num-unlabeled", "30", "--epochs", "1"]
        main(["train", *small, "--out", "runs/my-run", "-q"])
    return folder


@pytest.fixture
def names() -> dict[str, Any]:
    """What a reader's Python has at hand: a network, an optimizer, images with labels, a loader."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    images, labels = torch.randn(24, 3, 2, 2), torch.arange(24) % 3
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "images": images,
        "labels": labels,
        "x": images,
        "y": labels,
        "loader": list(zip(images.split(8), labels.split(8), strict=True)),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(
    page: Path,
    prepared: Path,
    names: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, block in enumerate(blocks(page)):
        if block.not_run:
            continue
        named = FILE.match(block.text)
        if named:
            Path(named[1]).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            script = tmp_path / f"block{number}.py"
            script.write_text(block.text, encoding="utf-8")
            names |= runpy.run_path(str(script), names)
        elif block.kind in {"sh", "bash", "console"}:
            for words in commands(block):
                perform([*words, *block.added], capsys)


UNRUN = [block for page in PAGES for block in blocks(page) if block.not_run]


@pytest.mark.parametrize("block", UNRUN, ids=lambda block: block.where)
def test_options_of_what_is_not_run_exist(block: Block) -> None:
    asked = []
    for words in commands(block):
        line = shlex.join(words)
        found = re.match(r"gmprobe (\S+) ?|torchrun .*?-m gm_probe (\S+) ?", line)
        if found:
            asked.append((found[1] or found[2], shlex.split(line[found.end() :])))
    for name, options in asked:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        command.make_context(name, options)
    if not asked:
        pytest.skip(block.not_run)


def test_blocks_are_of_a_known_kind() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.kind in {"sh", "bash", "python", "toml", "text"}, block.where
            if block.kind == "toml":
                tomllib.loads(block.text)


def links(page: Path) -> Iterator[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    yield from re.findall(r"\]\(([^)#\s]+)", text)


RESULTS = sorted((ROOT / "benchmarks").rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in links(page) if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_index_has_every_page() -> None:
    pages = {page.name for page in PAGES[1:]} - {"README.md"}
    assert pages <= set(links(ROOT / "docs" / "README.md"))
    assert "docs/README.md" in set(links(ROOT / "README.md"))
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {f"docs/{page}" for page in pages} <= set(re.findall(r"\S+\.md", site))


def test_the_benchmarks_index_has_every_result() -> None:
    indexes = [page for page in RESULTS if page.name in {"README.md", "reproduction.md", "peers.md"}]
    linked = {(index.parent / link).resolve() for index in indexes for link in links(index)}
    assert set(RESULTS) - set(indexes) <= linked


def test_the_api_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: gm_probe\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted([*gm_probe.__all__, "optim"])


def test_every_exit_code_and_error_is_explained() -> None:
    codes = {kind.exit_code for kind in gm_probe.ProbeError.__subclasses__()} | {0, 1, 130, 143}
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)? ?\|", text, re.MULTILINE)
    assert {int(code) for code, _ in rows} == codes
    named = {(name, int(code)) for code, name in rows if name.endswith("Error")}
    kinds = [
        kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__
    ]
    assert named == {(kind.__name__, kind.exit_code) for kind in kinds} - {("ProbeError", 1)}
    assert {kind.__name__ for kind in kinds} <= set(gm_probe.__all__)


@pytest.mark.parametrize("name", gm_probe.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(gm_probe, name)
    if not callable(value):  # a constant's docstring stands below it in its module
        home = inspect.getsource(import_module(f"gm_probe.{gm_probe._HOME_OF[name]}"))
        places = {
            ast.unparse(n.target): i
            for i, n in enumerate(ast.parse(home).body)
            if isinstance(n, ast.AnnAssign)
        }
        below = ast.parse(home).body[places[name] + 1]
        assert isinstance(below, ast.Expr)
        assert isinstance(ast.literal_eval(below.value), str)
        return
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # what dataclasses write where there is none
    if inspect.isclass(value):
        public = [
            n for n, member in vars(value).items() if inspect.isfunction(member) and not n.startswith("_")
        ]
        assert not [n for n in public if not inspect.getdoc(getattr(value, n))]


def test_the_citation_can_be_read() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
