"""Who may import whom, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ship_ds.config  # noqa: F401  # it registers the kinds
from ship_ds.kinds import ADAPTERS
from ship_ds.section import Section
from tests.conftest import REPOSITORY, environment

PACKAGE = REPOSITORY / "ship_ds"
GROUND = (
    "adapter_files",
    "errors",
    "files",
    "lora_folder",
    "origin",
    "parsing",
    "safetensors_header",
    "section",
    "tensor_file",
    "weights_folder",
)
"""Modules that everything may build on; they import nothing of the project but each other."""
SHARED = {
    "MIN_EXAMPLES_PER_TASK": "a reader's, which `read_tasks` looks up in its module",
}
"""Names that several modules define, as one thing."""


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it: {"ship_ds.errors", ...}."""
    return imported_by(ast.parse(path.read_text()))


def imported_by(tree: ast.Module) -> set[str]:
    """See `imported`."""
    modules = set()
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
    return {module for module in modules if module.startswith("ship_ds")}


def needed(path: Path) -> set[str]:
    """The project's modules that a file needs as it runs, late imports too, and not for types
    alone."""
    tree = ast.parse(path.read_text())
    for node in statements(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return imported_by(tree)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Those of a module, at any depth; the expressions in them are many times as many nodes."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child
            yield from statements(child)


def test_no_circle_is_hidden_by_a_late_import() -> None:
    """Nor by any other: what a module needs does not need it."""
    paths = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    needs = {
        # Not the packages around a module, whose own files are run before it anyway.
        name: {other for other in needed(path) & paths.keys() if not is_inside(name, other)}
        for name, path in paths.items()
    }
    assert needs["ship_ds.cli.using"] >= {"ship_ds.api", "ship_ds.errors"}
    while free := [name for name in needs if not needs[name] & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"in a circle, or above one: {sorted(needs)}"


def name_of(path: Path) -> str:
    """PACKAGE/model/ship.py -> ship_ds.model.ship; a package's own file by the package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("below", ["api.py", "bundle.py", "inference", "model", "data", "runtime"])
def test_export_builds_on_the_api_and_nothing_below_on_export(below: str) -> None:
    root = PACKAGE / below
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    assert files
    for path in files:
        assert not [m for m in imported(path) if is_inside(m, "ship_ds.export")], path


def test_the_bundle_does_not_import_what_is_made_of_it() -> None:
    above = ("api", "inference", "evaluation", "export", "train", "cli")
    modules = imported(PACKAGE / "bundle.py")
    assert not [m for m in modules for package in above if is_inside(m, f"ship_ds.{package}")]


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_floor_stands_by_itself(name: str) -> None:
    allowed = {f"ship_ds.{other}" for other in GROUND}
    for module in imported(PACKAGE / f"{name}.py") - {"ship_ds"}:
        assert any(is_inside(module, other) for other in allowed), module


@pytest.mark.parametrize(
    "program",
    [
        "from ship_ds import UserError; import ship_ds.files, ship_ds.bundle;"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules);"
        "assert not heavy, heavy",
        pytest.param(
            "import torch; own = torch.compile;"
            "from ship_ds import Ship; from ship_ds.api import Ship as same; assert Ship is same;"
            "assert 'deepspeed' not in sys.modules;"
            "import ship_ds.train, bitsandbytes;"
            "assert 'torch._inductor.compile_fx' not in sys.modules;"
            "assert torch.compile is own",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["none for the package", "no DeepSpeed for Ship, no compiler for the trainer"],
)
def test_what_an_import_costs(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, ship_ds; {program}"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # bitsandbytes misses a kernel of the hub's at every start, which no user can mend.
    assert "kernels-community" not in done.stdout + done.stderr


def test_a_name_is_one_thing() -> None:
    """Classes, type aliases, named tuples, type variables and constants; a function may be named
    as another where its module is said with it."""
    homes: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            for name in defined(node):
                if not name.startswith("_"):
                    homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert len(homes) > 600
    several = {name: where for name, where in homes.items() if len(where) > 1}
    assert several.keys() == SHARED.keys(), several


def defined(node: ast.stmt) -> list[str]:
    """Names of a module's classes and of what it assigns: `Pair = tuple[int, int]` -> ["Pair"]."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


VAGUE = {"beat", "found", "gone", "looked", "looks", "own", "said", "settled", "told", "wanted"}
"""They say how a thing came about, and not what it is."""


def test_no_name_says_how_a_thing_came_about() -> None:
    vague = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for field in ("id", "attr", "arg", "name")
        if isinstance(name := getattr(node, field, None), str) and name.strip("_").lower() in VAGUE
    }
    assert not vague


ADAPTERS_ROOM = PACKAGE / "model" / "adapters"
MAY_ASK = {
    "evaluation/baselines/frozen_base.py": {"Adapter"},  # or a function that makes one: no kind
    "model/projections.py": {"AdaptedBlock"},  # whether a block is wrapped, by whatever kind
    "planner/plan.py": {"AdaptedBlock"},
}
"""By file, the classes of the adapters' port that it may ask for, since they are of no kind."""


def asked_for(path: Path) -> set[str]:
    """The last names of the classes and the members that a file asks whether a thing is or has."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(ast.Name("isinstance" | "issubclass"), [_, classes]):
                for part in ast.walk(classes):
                    found.add(getattr(part, "id", getattr(part, "attr", "")))
            case ast.Call(ast.Name("getattr" | "hasattr"), [_, ast.Constant(str(name)), *_]):
                found.add(name)
    return found


def test_nobody_outside_the_port_asks_of_what_kind_an_adapter_is() -> None:
    kinds = {ADAPTERS.config_class(name) for name in ADAPTERS.names()}
    names = {one.__name__ for kind in kinds for one in kind.__mro__ if issubclass(one, Section)}
    for path in ADAPTERS_ROOM.glob("*.py"):
        names |= {
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
        }
    names = names - {"Section"} | {"parts", "latent", "num_blocks", "as_lora"}
    assert {"LoraAdapter", "CombinedAdapter", "CombinationConfig", "FactorConfig"} <= names
    # config.py is where the sections of the kinds are; `parts_of` and `lora_of` answer for them.
    outside = set(PACKAGE.rglob("*.py")) - set(ADAPTERS_ROOM.glob("*.py")) - {PACKAGE / "config.py"}
    found = {str(path.relative_to(PACKAGE)): asked_for(path) & names for path in outside}
    assert {path: asked for path, asked in found.items() if asked} == MAY_ASK


def test_what_is_not_there_is_said_as_by_python() -> None:
    import ship_ds

    with pytest.raises(AttributeError, match="module 'ship_ds' has no attribute 'Shop'"):
        _ = ship_ds.Shop
