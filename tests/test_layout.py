"""Three floors: q4_break/health.py imports torch alone, common.py imports health, and scripts import both."""

import ast
import sys

import pytest
from conftest import FILES, ROOT, SCRIPTS

MODULES = {name.removesuffix(".py").replace("/", "."): name for name in [*FILES, "common.py"]}


def imports_of(name):
    """The modules that a file of the project imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_common_and_health_but_no_script(script):
    ours = imports_of(script) & MODULES.keys()
    assert "common" in ours
    assert ours <= {"common", "q4_break.health"}


def test_common_imports_health_at_its_top_and_no_script():
    assert imports_of("common.py") & MODULES.keys() == {"q4_break.health"}
    tree = ast.parse((ROOT / "common.py").read_text(encoding="utf-8"))
    top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "q4_break.health" in top


def test_health_imports_torch_alone():
    roots = {name.partition(".")[0] for name in imports_of("q4_break/health.py")}
    assert roots - sys.stdlib_module_names == {"torch"}
