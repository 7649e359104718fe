"""The import direction: cli -> training, release, experiments -> models, data, probe, which know only themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import forks, run_anew

PACKAGE = Path(__file__).parents[1] / "condzoo"
LEAVES = ("models", "data", "probe")
# module or subpackage -> what of condzoo it may import besides itself
ALLOWED = {
    "models": set(),
    "data": set(),
    "probe": set(),
    "integrations": {"probe"},
    "catalog": {"models"},
    "training": {"models", "data", "probe", "exit_codes"},
    "checkpoints": {"models", "data", "probe"},
    "exit_codes": set(),
    "validation": {"models", "probe", "catalog", "checkpoints"},
    "evaluating": {"models", "data", "catalog", "checkpoints", "training", "probe"},
    "probing": {"models", "data", "probe", "catalog", "checkpoints", "evaluating", "training"},
    "conversion": {"models", "catalog", "checkpoints", "probe"},
    "release": {"models", "data", "probe", "catalog", "checkpoints", "training"},
    "experiments": {"models", "data", "probe", "training"},
}
TOP = {"cli", "commands", "__main__", "__init__"}


def imports_of(source: str) -> set[str]:
    """The subpackages or modules of condzoo that a source text imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "condzoo" else [node.module]
            )
        else:
            continue
        found |= {name.split(".")[1] for name in names if name and name.startswith("condzoo.")}
    return found


def test_imports_of_sees_every_form():
    source = "import condzoo.models.mlp\nfrom condzoo import training\ndef f():\n    from condzoo.probe import x\n"
    assert imports_of(source) == {"models", "training", "probe"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_is_below_it(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in TOP:
        return
    wrong = imports_of(path.read_text()) - {part} - ALLOWED[part]
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)} of condzoo"


def test_no_module_has_the_name_of_something_condzoo_exports():
    import condzoo

    modules = {p.stem for p in PACKAGE.rglob("*.py")} | {p.parent.name for p in PACKAGE.rglob("__init__.py")}
    assert not modules & set(condzoo.__all__)


@pytest.mark.parametrize("statement", ["import condzoo", "import condzoo.cli", "import condzoo; condzoo.list_models()"])
def test_light_imports_leave_torch_alone(statement):
    heavy = {"torch", "timm", "matplotlib", "lightning", "transformers"}
    code = f"import sys\n{statement}\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@forks
def test_the_probe_needs_nothing_else_of_condzoo(tmp_path):
    code = "import sys, condzoo.probe; print(sorted(m for m in sys.modules if m.startswith(('condzoo', 'timm'))))"
    loaded = run_anew(code, tmp_path, ("condzoo", "timm"))
    assert "condzoo.probe" in loaded
    for other in ("condzoo.models", "condzoo.data", "condzoo.training", "condzoo.integrations", "timm"):
        assert other not in loaded


@forks
def test_packages_are_attributes_without_an_import_of_their_own(tmp_path):
    code = (
        "import condzoo\n"
        "assert condzoo.probe.top_curvature and condzoo.probe.write_tensorboard and condzoo.data.augment\n"
        "for name in condzoo._PACKAGES: assert getattr(condzoo, name).__name__ == 'condzoo.' + name\n"
        "assert {'probe', 'training', 'measure'} < set(dir(condzoo))"
    )
    run_anew(code, tmp_path)


def test_what_is_allowed_is_needed():
    """Else the map above would permit what nobody looked at, such as two packages that import each other."""
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        used.setdefault(part, set()).update(imports_of(path.read_text()) - {part})
    assert {part: allowed - used[part] for part, allowed in ALLOWED.items() if allowed - used[part]} == {}
