"""Turns the little reStructuredText of the docstrings into Markdown, for the reference pages.

Docstrings are read in a terminal too, where ``.. math::`` and ``:class:`Episode``` stand well; here
they become display formulas and code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^\.\. math:: *(.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
LITERAL = re.compile(r"``([^`]+)``")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """One docstring, with its formulas and roles as Markdown has them."""
    text = BLOCK.sub(lambda m: "$$\n" + re.sub(r"\s+", " ", m.group(1)).strip() + "\n$$", text)
    text = INLINE.sub(lambda m: "$" + re.sub(r"\s+", " ", m.group(1)) + "$", text)
    text = LITERAL.sub(r"`\1`", text)
    text = EXAMPLE.sub(r"\1Examples:", text)  # the section that is rendered as code
    return ROLE.sub(r"`\1`", text)


class RstToMarkdown(griffe.Extension):
    """Applies `to_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
