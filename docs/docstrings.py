# SPDX-License-Identifier: Apache-2.0
"""Docstrings as the site shows them: roles of Sphinx become code, and an example is a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?\.?([^`]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class AsMarkdown(griffe.Extension):
    """Turn what the docstrings of this package have into what mkdocstrings reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002  (griffe's signature)
        """Rewrite one docstring; called by griffe.

        Args:
            obj: a module, class, function or attribute.
            kwargs: not used.
        """
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", ROLE.sub(r"`\1`", obj.docstring.value))
