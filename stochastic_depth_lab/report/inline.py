"""Turns matplotlib's SVG files into elements of a page, whose style sheet then rules their colours."""

import re
from xml.etree import ElementTree

from stochastic_depth_lab.report.theme import CSS_NAMES


def inline_svg(svg: bytes, name: str, title: str) -> str:
    """The `<svg>` element of a file drawn in the colours of `theme`, to be put into a page once.

    Args:
        svg: The file. It must be drawn without a background.
        name: Goes in front of every identifier, as those of a page's figures must differ.
        title: What a screen reader says in place of the figure.
    """
    # Parsed, not searched: a run's name may look like an attribute or a colour.
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # The metadata name a library, the style rules would reach the whole page: it has them itself.
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _own(value, name) for key, value in element.attrib.items()}
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _own(value: str, name: str) -> str:
    value = re.sub(r"^#(?![0-9a-f]{6}$)|(?<=url\()#", f"#{name}-", value)
    return re.sub(r"#[0-9a-f]{6}(?![\w-])", _variable, value)


def _variable(colour: re.Match[str]) -> str:
    """The style sheet's name for a colour of `theme`; the colours of a heat map are what they are."""
    name = CSS_NAMES.get(colour.group())
    return f"var({name})" if name else colour.group()
