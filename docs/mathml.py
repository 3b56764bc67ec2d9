"""A hook of mkdocs: equations become MathML when a page is built, so that a browser needs no script."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)

logger = logging.getLogger("mkdocs.hooks.mathml")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace what the extension arithmatex has marked."""

    def mathml(match: re.Match[str]) -> str:
        tag, bracket, latex = match[1], match[2], html.unescape(match[3]).strip()
        made = convert(latex, display="block" if bracket == "[" else "inline")
        if "\\" in html.unescape(re.sub(r"<[^>]*>", "", made)):
            # With --strict a warning fails the build.
            logger.warning("%s: a command in %r has no MathML", page.file.src_path, latex)
        return f'<{tag} class="math">{made}</{tag}>'

    return _EQUATION.sub(mathml, content)
