"""The page of `gmprobe report`: whole, self-contained, accessible, escaped, and true to the statistics."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from scipy import stats

from gm_probe.analysis import report
from gm_probe.cli import main
from gm_probe.files.atomic import write_json, write_toml

ATTACK = "<script>alert(1)</script>"
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Elements of an HTML page with their attributes, the tags around them and the text inside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        given = {key: value or "" for key, value in attrs}
        self.elements.append((tag, given, tuple(name for name, _ in self.open), text))
        if tag not in VOID:
            self.open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, text in self.open:
            text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _, _ in self.elements if name == tag]

    def texts(self, tag: str, inside: str = "html") -> list[str]:
        return [
            " ".join("".join(text).split())
            for name, _, around, text in self.elements
            if name == tag and inside in around
        ]

    def table(self, name: str) -> list[list[str]]:
        """The cells of the table with id ``table-name``, the head first."""
        rows: list[list[str]] = []
        inside = False
        for tag, attributes, around, text in self.elements:
            if tag == "table":
                inside = attributes.get("id") == f"table-{name}"
            if inside and tag == "tr":
                rows.append([])
            if inside and tag in ("th", "td") and "table" in around:
                rows[-1].append("".join(text).strip())
        return rows


def write_runs(root: Path) -> Path:
    """3 lr × 2 models × 2 seeds, one of them without tr F; and a diverged, a failed and an unmeasured run."""
    rng = np.random.default_rng(0)
    for i in range(15):
        folder = root / (f"run-{i:02d}" if i != 3 else f"run-03{ATTACK.replace('/', '')}")
        config = {"lr": (0.1, 0.2, 0.3)[i % 3], "model": ("6cnn", f"m{ATTACK}")[i // 3 % 2], "seed": i // 6}
        write_toml(folder / "config.toml", {**config, "environment": {"torch": "2.14.1", "device": "cpu"}})
        status = {12: "diverged", 13: "failed"}.get(i, "finished")
        error = float(rng.uniform(0.1, 0.5))
        summary = {
            "status": status,
            "error_gap": error,
            "ce_gap": 3 * error + float(rng.normal()),
            "num_test": 1000,
        }
        write_json(
            folder / "summary.json", summary | {"train_error": 0.0, "test_error": error, "num_train": 1000}
        )
        lines = [json.dumps({"epoch": e, "running_loss": 2.0 / e}) for e in range(1, 6)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        if i == 14:
            continue
        grid = [{"rho": r, "k_steps": k, "value": float(rng.normal())} for r in (0.05, 0.1) for k in (1, 3)]
        trace: dict[str, Any] = {"value": float(rng.normal()), "converged": i != 2}
        measures = {
            "local_inconsistency": {
                "value": error + 0.1 * float(rng.normal()),
                "protocol": "paper",
                "grid": grid,
            },
            "fisher_trace": {"value": None, "reason": f"lost {ATTACK}"} if i == 1 else trace,
        }
        write_json(folder / "measures.json", {"settings": {"rho": 0.1}, "measures": measures})
    return root


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Exit code and stderr of ``gmprobe report``."""
    code, _, err = command_line.run(["report", *args], capsys)
    return code, err


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path / "a & b")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs in ``a & b`` and everything that can be made of them, for tests that only read."""
    folder = tmp_path_factory.mktemp("whole")
    outputs = [
        f"--out={folder / 'page.html'}",
        f"--markdown={folder / 't.md'}",
        f"--latex={folder / 't.tex'}",
    ]
    choices = ["--group-by=model", "--markers=lr", "--converged-only", "--quiet"]
    figures = f"--figures={folder / 'figures'}"
    main(["report", str(write_runs(folder / "a & b")), *choices, *outputs, figures])
    return folder


@pytest.fixture(scope="module")
def text(whole: Path) -> str:
    return (whole / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


Made = Callable[..., tuple[str, Page]]


@pytest.fixture
def made(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Made:
    def make(*options: str) -> tuple[str, Page]:
        out = tmp_path / "page.html"
        code, err = run(capsys, str(runs), f"--out={out}", *options)
        assert code == 0, err
        text = out.read_text(encoding="utf-8")
        return text, Page(text)

    return make


def test_nothing_is_fetched_and_the_policy_allows_only_what_is_there(text: str, page: Page) -> None:
    for tag, attributes, _, _ in page.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "action", "data", "srcset", "poster"):
                assert value.startswith(("#", "data:")), (tag, key, value)
            assert key != "style", tag
            assert not key.startswith("on"), (tag, key)
            assert "url(" not in value or "url(#" in value
    assert not re.search(r"@import|url\(", "".join(page.texts("style")))
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for tag in ("style", "script"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in policy


def test_markup_in_names_settings_and_reasons_is_text(text: str, page: Page) -> None:
    assert len(page.all("script")) == 1
    assert ATTACK not in text
    assert ATTACK.replace("/", "") not in text
    runs = page.table("runs")
    assert "run-03<script>alert(1)<script>" in [row[0] for row in runs]
    assert f"m{ATTACK}" in [row[runs[0].index("model")] for row in runs]
    assert any(f"lost {ATTACK}" in note for note in page.texts("li"))
    assert any(f"model=m{ATTACK}" in row[2] for row in page.table("correlations"))
    assert page.texts("title")[0] == "Generalization measures of a & b"


def test_ids_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    ids = Counter(a["id"] for _, a, _, _ in page.elements if "id" in a)
    assert max(ids.values()) == 1
    for tag, attributes, _, _ in page.elements:
        for name in attributes.get("aria-labelledby", "").split():
            assert name in ids, (tag, name)
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        for link in re.findall(r"url\(#(.*?)\)", " ".join(attributes.values())):
            assert link in ids


def test_figures_are_named_and_described_and_tables_sort_by_button(page: Page) -> None:
    figures = page.all("figure")
    drawings = page.all("img")
    assert len(figures) == len(drawings) == len(page.texts("figcaption")) > 8
    for drawing in drawings:
        kind, _, data = drawing["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data).rstrip().endswith(b"</svg>")
    titles = [drawing["alt"] for drawing in drawings]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    heads = [(a, text) for tag, a, around, text in page.elements if tag == "th" and "thead" in around]
    buttons = page.texts("button", inside="thead")
    assert len(heads) == len(buttons) > 50
    assert all(a["scope"] == "col" and a["aria-sort"] == "none" for a, _ in heads)
    assert all(a["type"] == "button" for a in page.all("button"))
    rows = [a for tag, a, around, _ in page.elements if tag == "th" and "tbody" in around]
    assert all(a["scope"] == "row" for a in rows)
    boxes = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table"))
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in boxes)
    (root,) = page.all("html")
    assert root["lang"] == "en"
    assert "width=device-width, initial-scale=1" in [a.get("content") for a in page.all("meta")]
    skip = page.all("a")[0]
    assert (skip["class"], skip["href"]) == ("skip", "#main")
    assert [a["id"] for a in page.all("main")] == ["main"]
    assert len(page.texts("h1")) == 1


def test_figures_in_the_table_are_scipy_s_and_sort_by_their_value(page: Page, whole: Path) -> None:
    head, *rows = page.table("correlations")
    assert [row[:2] for row in rows] == [
        [name, gap]
        for gap in ("error gap", "CE gap")
        for name in ("local_inconsistency", "fisher_trace")
        for _ in range(3)
    ]
    values, gaps = [], []
    for i in range(12):
        (folder,) = (whole / "a & b").glob(f"run-{i:02d}*")
        values.append(
            json.loads((folder / "measures.json").read_text())["measures"]["local_inconsistency"]["value"]
        )
        gaps.append(json.loads((folder / "summary.json").read_text())["error_gap"])
    tau = stats.kendalltau(values, gaps).statistic
    assert rows[0][head.index("Value")].startswith(f"{tau:.2f}")
    assert [row[head.index("n")] for row in rows[::3]] == ["12", "11"] * 2
    orders = [float(a["data-order"]) for a in page.all("td") if "data-order" in a]
    assert any(order == pytest.approx(tau, abs=1e-12) for order in orders)


def test_every_exclusion_is_listed_with_its_reason(page: Page) -> None:
    _, *rows = page.table("exclusions")
    assert [row[:3] for row in rows] == [
        ["whole run", "diverged", "1"],
        ["whole run", "failed", "1"],
        ["whole run", "not measured", "1"],
        ["its fisher_trace", f"lost {ATTACK}", "1"],
        ["nothing (its fisher_trace is kept)", "not converged", "1"],
    ]
    assert [row[3] for row in rows] == ["run-12", "run-13", "run-14", "run-01", "run-02"]
    assert len(page.table("runs")) == 13
    told = "12 runs of 6 settings entered, 3 left out (1 × diverged; 1 × failed; 1 × not measured)."
    assert told in page.texts("p", inside="header")


def test_the_answer_and_its_figure_come_first_and_what_is_long_is_folded(page: Page) -> None:
    order = [(tag, a.get("id") or a.get("class") or a.get("alt", "")) for tag, a, _, _ in page.elements]
    answer = order.index(("div", "answer"))
    forest = order.index(("img", "Kendall’s τ-b with 95 % intervals"))
    assert answer < forest < order.index(("nav", "")) < order.index(("main", "main"))
    first, *_ = page.texts("p", inside="header")
    assert "the error gap" in first
    folded = {
        text.split("  ")[0]: "open" in a
        for (tag, a, _, text) in [
            (tag, a, around, " ".join("".join(text).split())) for tag, a, around, text in page.elements
        ]
        if tag == "details"
    }
    assert not any(
        opened for text, opened in folded.items() if text.startswith(("Left out", "How the runs", "Runs"))
    )


def test_each_section_with_a_figure_begins_with_what_it_shows(page: Page) -> None:
    leads = {}
    section = ""
    for tag, a, _, text in page.elements:
        section = a["id"] if tag == "section" else section
        if tag == "p" and a.get("class") == "lead":
            leads[section] = " ".join("".join(text).split())
    assert leads["correlation"].startswith("The interval of τ excludes 0 for ")
    assert "has the largest |τ| with the error gap: τ = " in leads["scatter"]
    assert leads["beyond"].startswith("Where one hyperparameter differs, the measures' Ψ is ")
    assert leads["comparisons"] == "No two measures order the runs alike (τ > 0.98)."
    assert leads["selection"].startswith(("The best pick", "No measure picks"))
    assert leads["grid"].startswith("Over all ρ and K, τ of S_ρ with the error gap is ")


def test_the_page_tells_where_it_came_from(page: Page, whole: Path) -> None:
    command, trained = page.texts("pre")
    assert command.startswith("gmprobe report ")
    assert f"'{whole / 'a & b'}'" in command
    assert "--group-by=model --markers=lr --quiet" in command
    assert " --converged-only " in command
    assert trained.count("gmprobe train --lr=") == 12
    assert ["torch", "2.14.1"] in page.table("trained")
    assert ["numpy", np.__version__] in page.table("versions")
    assert ["rho", "0.1"] in page.table("measured")
    defined = [row[0] for row in page.table("measures")]
    assert defined == ["Measure", "local_inconsistency", "fisher_trace"]
    assert {"τ", "95 % CI, p", "ψ, Ψ", "K(S)", "sign error"} <= {row[0] for row in page.table("statistics")}


def test_the_same_runs_give_the_same_page(made: Made) -> None:
    assert made("--gap=ce_gap")[0] == made("--gap=ce_gap")[0]


def test_tables_and_figures_are_written_beside_it(whole: Path, page: Page) -> None:
    markdown, latex = (whole / "t.md").read_text(), (whole / "t.tex").read_text()
    for sheet in ("Correlations", "What a single τ hides", "Left out"):
        assert f"### {sheet}" in markdown
    assert "<script" not in markdown.replace("\\<script", "")
    assert latex.count("\\toprule") == latex.count("\\bottomrule") == markdown.count("\n| --- ")
    assert "<" not in latex
    names = Counter(path.suffix for path in (whole / "figures").iterdir())
    assert names == dict.fromkeys((".png", ".pdf", ".svg"), len(page.all("figure")))
    assert (whole / "figures" / "forest.png").exists()
    assert (whole / "figures" / "grid-error_gap.svg").exists()
    assert any("number of ascent steps K: 12 runs." in text for text in page.texts("figcaption"))


def test_sections_without_content_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    rows = [f"{a},{b}" for a, b in rng.normal(size=(8, 2))]
    (tmp_path / "mine.csv").write_text("\n".join(["error_gap,my_measure", *rows]))
    code, err = run(capsys, str(tmp_path / "mine.csv"))
    assert code == 0, err
    page = Page((tmp_path / "mine-report.html").read_text())
    links = [a["href"] for a in page.all("a")]
    assert "#training" not in links
    assert "#grid" not in links
    assert "#correlation" in links
    assert any("Defined by the author of the table: my_measure" in text for text in page.texts("p"))
    assert page.table("trained") == []


def test_no_name_leads_a_figure_s_file_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("error_gap,../../up,a/b,a:b\n0.1,1,2,3\n0.2,2,1,2\n0.3,3,4,5\n")
    figures = tmp_path / "deep" / "figures"
    args = [str(tmp_path / "t.csv"), f"--figures={figures}", f"--out={tmp_path / 'page.html'}"]
    code, err = run(capsys, *args)
    assert code == 0, err
    files = {path for path in tmp_path.rglob("*") if path.is_file()} - {
        tmp_path / "t.csv",
        tmp_path / "page.html",
    }
    assert {path.parent for path in files} == {figures}
    assert len([path for path in files if path.name.startswith("scatter-")]) == 3 * 3


def test_a_broken_training_record_is_a_caution_not_an_end(made: Made, runs: Path) -> None:
    (runs / "run-00" / "metrics.jsonl").unlink()
    _, page = made()
    assert any(
        "Runs without a readable training curve: 1, the first run-00: " in text for text in page.texts("li")
    )
    assert any("11 runs, one line per run" in text for text in page.texts("figcaption"))


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["missing"], 2, "does not exist"),
        (["--out=page.pdf"], 2, "ends in .html"),
        (["--group-by=nonsense"], 2, "nonsense"),
        (["--markers=nonsense"], 2, "nonsense"),
        (["--measures=fisher"], 2, "did you mean"),
        (
            ["--hyper=lr,seed,model", "--markers=lr,seed,model"],
            2,
            "--markers makes 12 subgroups, and a figure can distinguish 10",
        ),
        (["--out=/proc/no/page.html"], 7, "/proc/no"),
    ],
)
def test_errors_are_one_line_with_the_right_code(
    runs: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, words: str
) -> None:
    given = args if not args[0].startswith("--") else [str(runs), *args]
    found, err = run(capsys, *given)
    assert found == code
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not list(runs.glob("*.html"))


def test_no_file_is_written_over_another_or_over_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("error_gap,m\n0.1,2\n0.2,3\n")
    before = table.read_text()
    for options, words in (
        ([f"--markdown={table}"], "--markdown"),
        ([f"--latex={tmp_path / 'x' / '..' / 't.csv'}"], "is SOURCE too"),
        ([f"--markdown={tmp_path / 'a'}", f"--latex={tmp_path / 'a'}"], "is --markdown too"),
        ([f"--markdown={tmp_path / 't-report.html'}"], "is --out too"),
    ):
        code, err = run(capsys, str(table), *options)
        assert code == 2
        assert words in err
    assert table.read_text() == before
    assert list(tmp_path.iterdir()) == [table]


def test_control_characters_do_not_break_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    rows = "".join(f"\x07{i},{'ab'[i % 2]}\x1b[31m,{i},{i * 7 % 5}\n" for i in range(8))
    table.write_text("run,kind,error_gap,m\n" + rows)
    code, err = run(capsys, str(table), "--hyper=kind", "--group-by=kind")
    assert code == 0, err
    text = (tmp_path / "t-report.html").read_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"kind=a\x1b[31m" in text


def test_a_page_without_a_single_tau_says_why_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "same.csv").write_text("error_gap,m\n0.1,2\n0.2,2\n0.3,2\n")
    code, err = run(capsys, str(tmp_path / "same.csv"), "--quiet")
    assert code == 4
    assert err.startswith("gmprobe: no measure in ")
    page = Page((tmp_path / "same-report.html").read_text())
    assert page.table("correlations")[1][3:5] == ["—a", "—"]
    assert "a the measure is constant over 3 runs" in page.texts("li")
    assert any(
        "τ undefined: the measure is constant over 3 runs" in text for text in page.texts("figcaption")
    )


def test_text_that_opens_a_tag_in_the_page_s_own_parts_would_break_their_hash() -> None:
    """The parts go in unescaped; what closes them early must not be in them."""
    for name in ("report.css", "report.js"):
        assert "</" not in report._part(name)
