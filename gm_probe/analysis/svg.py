"""A matplotlib figure as SVG inside an HTML page: dark mode, strict CSP, unique ids, a text for who cannot see."""

import xml.etree.ElementTree as ET

from matplotlib.figure import Figure

from gm_probe.analysis.plots import render

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
INK = "#000000"
"""Matplotlib's colour of text, axes and whatever else is to stand out; becomes the page's text colour."""


def inline(figure: Figure, name: str, title: str, description: str) -> str:
    """``figure`` as one <svg> element, named ``title`` and described by ``description``.

    Its ids begin with ``name``, which must be unique on the page. Style attributes, which a strict content
    security policy forbids, become presentation attributes; black becomes ``currentColor``; the page sets the
    size (``viewBox`` keeps the shape).
    """
    root = ET.fromstring(render(figure, "svg", transparent=True))
    for child in list(root):
        if child.tag == f"{SVG}metadata":
            root.remove(child)
    for parent in list(root.iter(f"{SVG}defs")):
        for style in parent.findall(f"{SVG}style"):
            parent.remove(style)  # its two rules for every line stand in the page's own style sheet
    used = {link.removeprefix("#") for each in root.iter() if (link := each.get(LINK, "")).startswith("#")}
    used |= {each.get("clip-path", "")[5:-1] for each in root.iter()}
    for each in root.iter():
        each.tag = each.tag.removeprefix(SVG)
        for key, value in _presentation(each.attrib.pop("style", "")).items():
            each.set(key, value)
        for key, value in each.attrib.items():
            if value == INK:
                each.set(key, "currentColor")
        if each.get("id") in used:
            each.set("id", f"{name}-{each.get('id')}")
        else:
            each.attrib.pop("id", None)
        if LINK in each.attrib:
            link = each.attrib.pop(LINK)
            each.set("href", f"#{name}-{link[1:]}" if link.startswith("#") else link)
        if "clip-path" in each.attrib:
            each.set("clip-path", f"url(#{name}-{each.attrib['clip-path'][5:-1]})")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(place, element)
    return ET.tostring(root, encoding="unicode")


def _presentation(style: str) -> dict[str, str]:
    """``a: b; c: d`` as presentation attributes; the font family is the page's to choose."""
    found: dict[str, str] = {}
    for rule in filter(None, map(str.strip, style.split(";"))):
        key, _, value = (part.strip() for part in rule.partition(":"))
        if key == "font":  # matplotlib before 3.10 writes one shorthand: oblique 700 8px 'DejaVu Sans'
            for word in value.partition("'")[0].split():
                kind = (
                    "font-size" if word.endswith("px") else "font-weight" if word.isdigit() else "font-style"
                )
                found[kind] = word
        elif key != "font-family":
            found[key] = value
    return found
