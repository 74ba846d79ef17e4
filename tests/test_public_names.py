# SPDX-License-Identifier: Apache-2.0
"""The names that users import, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_bn


@pytest.mark.slow
def test_importing_the_package_imports_neither_torch_nor_lightning():
    """``import lightning_bn`` alone is light; the first use of a name loads what it needs."""
    code = (
        "import sys, lightning_bn; dir(lightning_bn); heavy = {'torch', 'lightning', 'pytorch_lightning', 'rich'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "lightning_bn.Finding; assert not heavy & set(sys.modules);"
        "lightning_bn.NaNGuard; assert heavy - {'rich'} <= set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_listed():
    """``dir`` shows every public name and each of them loads."""
    assert set(lightning_bn.__all__) <= set(dir(lightning_bn))
    assert all(getattr(lightning_bn, name).__name__ == name for name in lightning_bn.__all__)


def test_the_lazy_names_are_those_that_type_checkers_see():
    """The table of lazy imports, ``__all__`` and the imports for type checkers name the same things."""
    import ast  # noqa: PLC0415
    import inspect  # noqa: PLC0415

    tree = ast.parse(inspect.getsource(lightning_bn))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert seen == {f"lightning_bn.{home}.{name}" for name, home in lightning_bn._HOMES.items()}
    assert sorted(lightning_bn._HOMES) == sorted(lightning_bn.__all__)


def test_an_unknown_name_is_an_attribute_error():
    """A misspelt name fails like one of any other module."""
    with pytest.raises(AttributeError, match="NanGuard"):
        _ = lightning_bn.NanGuard


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["tensorboard", "jsonargparse", "sklearn"])
def test_the_callbacks_import_where_optional_packages_are_missing(missing):
    """Many projects have Lightning alone; the callbacks do not need more."""
    code = f"import sys; sys.modules[{missing!r}] = None; import lightning_bn; lightning_bn.diagnose()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
