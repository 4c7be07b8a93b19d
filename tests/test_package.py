"""What is installed: the packages that are imported are declared, and the wheel runs by itself in
an empty environment."""

import ast
import importlib.metadata
import os
import re
import site
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# flash_attn only runs on GPUs, and is an extra that needs CUDA's compiler to be installed.
OPTIONAL = ("judge", "flash", "serve")
_SERVER = ("app", "errors", "guard", "leaving", "metrics", "page", "server")
ONLY_IN = {
    "h11": {"ship_ds/serving/server.py"},
    "vllm": {"ship_ds/serving/vllm_plugin.py"},
    **{
        name: {f"ship_ds/serving/{file}.py" for file in _SERVER}
        for name in ("fastapi", "starlette", "uvicorn", "prometheus_client")
    },
}
"""Files that may import what most users do not have; whoever imports these files does so late."""


def imported(tree: ast.AST) -> Iterator[str]:
    """The first part of every absolute import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def normal(requirement: str) -> str:
    """A requirement's name as registries compare it: "Rouge_Score>=0.1" -> "rouge-score"."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.mark.slow
def test_every_import_is_declared_and_every_declaration_imported() -> None:
    modules = {
        name
        for path in (REPOSITORY / "ship_ds").rglob("*.py")
        for name in imported(ast.parse(path.read_text()))
    } - set(sys.stdlib_module_names)
    packages = importlib.metadata.packages_distributions()
    used = {
        normal(packages.get(name, [name])[0]) for name in modules if not name.startswith("ship_ds")
    }
    declared = {normal(text) for text in PROJECT["dependencies"]}
    extras = {normal(text) for name in OPTIONAL for text in PROJECT["optional-dependencies"][name]}
    # vLLM imports us, as a plugin.
    assert used - declared - extras == {"vllm"}
    # torch.utils.tensorboard imports it for us.
    assert declared - used == {"tensorboard"}


@pytest.mark.parametrize("python", ["3.11.2", "3.12.3"])
def test_what_is_pinned_runs_on_the_pythons_of_debian_and_ubuntu(python: str) -> None:
    """A pin that asks for a later patch of 3.11 leaves pip without a solution there."""
    pinned = re.findall(r"^([\w.-]+)(==\S+)", (REPOSITORY / "constraints.txt").read_text(), re.M)
    found = 0
    for name, version in pinned:
        try:
            of_package = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra
        found += 1
        # What is known of another version says nothing of the pin: `make setup` installs it.
        assert SpecifierSet(version).contains(of_package["Version"], prereleases=True), name
        needs = of_package.get("Requires-Python")
        assert needs is None or SpecifierSet(needs).contains(python), (name, needs)
    assert found > 100


def test_what_few_have_is_imported_in_named_files_alone() -> None:
    found: dict[str, set[str]] = {name: set() for name in ONLY_IN}
    for path in (REPOSITORY / "ship_ds").rglob("*.py"):
        for name in ONLY_IN.keys() & set(imported(ast.parse(path.read_text()))):
            found[name].add(str(path.relative_to(REPOSITORY)))
    for name, files in found.items():
        assert files and files <= ONLY_IN[name], (name, files - ONLY_IN[name])
    assert set().union(*found.values()) == set().union(*ONLY_IN.values())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment's folder of programs, with the wheel in it.

    Other packages are those of this environment, by a line in a .pth file: nothing is downloaded.
    Its own .pth files, such as that of an editable install, are not followed from there.
    """
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    # A copy, so that the build leaves nothing in the checkout, and takes nothing git ignores.
    for name in names:
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (REPOSITORY / name).is_symlink():
                (source / name).symlink_to(os.readlink(REPOSITORY / name))
            else:
                (source / name).write_bytes((REPOSITORY / name).read_bytes())
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "venv"), "install"]
    subprocess.run(
        [*install, "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel)],
        check=True,
    )
    programs = folder / "venv" / "bin"
    # Theirs too: another ninja would find the ops compiled by one that it does not know, compile
    # them again under the lock, and so would the next test with the first one.
    (programs / "ninja").symlink_to(Path(sys.executable).with_name("ninja"))
    return programs


def run_installed(programs: Path, folder: Path, *arguments: str) -> str:
    """Standard output of `ship-ds ARGUMENTS`, started far from the checkout."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(programs / "ship-ds"), *arguments],
        cwd=folder,
        env={
            **environment,
            "HF_HUB_OFFLINE": "1",
            "TORCH_EXTENSIONS_DIR": os.environ.get(
                "TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".build" / "torch_extensions")
            ),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    program = "import ship_ds; print(ship_ds.__file__)"
    place = subprocess.run(
        [str(installed / "python"), "-c", program],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(place).is_relative_to(installed.parent)


@pytest.mark.slow
def test_wheel_lists_recipes_and_plans(installed: Path, tmp_path: Path) -> None:
    assert "quickstart-smoke" in run_installed(installed, tmp_path, "recipes")
    plan = run_installed(
        installed, tmp_path, "plan", "--config", "pretrain-7b", "--shapes", "llama-2-7b"
    )
    assert "fit" in plan


@pytest.mark.slow
def test_wheel_trains_and_deduces(installed: Path, tmp_path: Path) -> None:
    short = ("run.folder=run", "training.steps=4", "evaluation.ends_with_report=false")
    run_installed(installed, tmp_path, "train", "--config", "quickstart-smoke", *short)
    assert (tmp_path / "run" / "bundle" / "manifest.json").is_file()
    said = run_installed(
        installed, tmp_path, "deduce", "add 5 to element 2", "--run", "run", "--out", "adapter"
    )
    assert "peft = live within" in said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
