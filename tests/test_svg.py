"""Figures inside a page: no style attribute, no clash of ids, nothing fetched, named and described."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gm_probe.analysis.svg import _presentation, inline


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(3, 2))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1, 2], [1, 3, 2], color="black")
    axes.scatter([0, 1], [2, 3], color="#d55e00")
    axes.pcolormesh(np.eye(2), cmap="cividis")
    axes.set_title(r"a <b> & $\lambda_{\max}$")
    axes.text(0, 0, "white", color="white")
    return figure


def parsed(markup: str) -> list[ET.Element]:
    return list(ET.fromstring(markup).iter())


def test_no_style_survives_but_its_effect_does(figure: Figure) -> None:
    elements = parsed(inline(figure, "f", "t", "d"))
    assert not [each for each in elements if "style" in each.attrib or each.tag == "style"]
    strokes = {each.get("stroke") for each in elements}
    assert "currentColor" in strokes
    fills = {each.get("fill") for each in elements}
    assert {"none", "#d55e00", "#ffffff"} <= fills
    assert "#000000" not in strokes | fills
    sizes = {each.get("font-size") for each in elements if each.tag == "text"}
    assert sizes >= {"10px"}
    assert {each.get("text-anchor") for each in elements} >= {"middle", "end"}


def test_ids_of_two_figures_never_meet_and_every_link_has_its_target(figure: Figure) -> None:
    both = [parsed(inline(figure, name, "t", "d")) for name in ("one", "two")]
    ids = [each.get("id") for elements in both for each in elements if each.get("id")]
    assert len(ids) == len(set(ids))
    for elements, name in zip(both, ("one", "two"), strict=True):
        own = {each.get("id") for each in elements}
        links = {each.get("href", "#")[1:] for each in elements if each.get("href")}
        links |= set(
            re.findall(r"url\(#(.*?)\)", " ".join(v for each in elements for v in each.attrib.values()))
        )
        assert links
        assert links <= own
        assert all(link.startswith(f"{name}-") for link in links)


def test_it_fetches_nothing_and_scales(figure: Figure) -> None:
    markup = inline(figure, "f", "t", "d")
    assert "http" not in markup.replace("http://www.w3.org/", "")
    root = ET.fromstring(markup)
    assert root.get("viewBox") == "0 0 216 144"
    assert not {"width", "height"} & set(root.attrib)


def test_points_drawn_as_pixels_are_embedded() -> None:
    figure = Figure(figsize=(2, 2))
    FigureCanvasAgg(figure)
    figure.add_subplot().plot([0, 1], [0, 1], "o", rasterized=True)
    images = [each for each in parsed(inline(figure, "f", "t", "d")) if each.tag == "image"]
    assert len(images) == 1
    assert images[0].get("href", "").startswith("data:image/png;base64,")


def test_title_and_description_are_text_whatever_they_hold(figure: Figure) -> None:
    root = ET.fromstring(inline(figure, "f", "<script>alert(1)</script>", "a & b"))
    assert root.get("role") == "img"
    named = root.get("aria-labelledby", "").split()
    texts = {each.get("id"): each for each in root}
    assert [texts[name].text for name in named] == ["<script>alert(1)</script>", "a & b"]
    assert [texts[name].tag for name in named] == ["title", "desc"]
    assert not list(root.iter("script"))


def test_the_older_matplotlib_s_font_shorthand_is_taken_apart() -> None:
    assert _presentation("font: italic 700 8px 'DejaVu Sans', sans-serif; text-anchor: end") == {
        "font-size": "8px",
        "font-style": "italic",
        "font-weight": "700",
        "text-anchor": "end",
    }
