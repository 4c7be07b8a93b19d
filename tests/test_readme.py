"""What README and docs/ say is true: commands, settings, files, links, printed errors, the tree."""

import ast
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from ship_ds import cli
from ship_ds.config import load_config, recipe_names
from ship_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
TREE = REPOSITORY / "docs" / "tree.md"
_PATH = re.compile(r"(?:ship_ds|tools|slurm|tests|docs|examples|ds_configs)/[\w./-]*\w")
_OVERRIDE = re.compile(r"^[a-z_]+(?:\.[a-z_]+)+=")
_TREE_LINE = re.compile(r"^    (?P<indent> *)(?P<name>[\w.-]+(?:/(?:\*\*)?)?)(?:  +\S.*)?$")

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY))
)


def blocks(text: str) -> Iterator[str]:
    """The lines of fenced and of indented code, continued lines joined."""
    is_fenced = False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def commands(text: str) -> list[list[str]]:
    """Every command of a shell in code, and every `ship-ds ...` between backticks."""
    lines = [*blocks(text), *re.findall(r"`(ship-ds [^`]+)`", text)]
    parsed: list[list[str]] = []
    for line in lines:
        if not re.match(r"[\w./=$-]+ ", line) or line.startswith(("from ", "import ", "ship-ds: ")):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # no shell: JSON or prose
            continue
        for is_end, group in itertools.groupby(words, lambda word: word in (";", "|", "&&", "do")):
            if not is_end:
                parsed.append(list(group))
    return parsed


def after(words: list[str], option: str) -> str | None:
    """The word behind an option."""
    return words[words.index(option) + 1] if option in words[:-1] else None


@every_page
def test_every_verb_and_option_exists(page: Path) -> None:
    """Parsed by the command line itself, without running the verb."""
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for words in commands(page.read_text()):
        words = words[words[0].startswith("SHIP_DS_PLUGINS=") :]
        if words[0] == "ship-ds" and words[1][0] not in "-.V<":
            arguments = [word for word in words[2:] if word != "..."]
            if arguments or words[1] in ("recipes", "doctor"):
                verbs[words[1]].make_context(words[1], list(arguments))
            assert words[1] in verbs


@every_page
def test_every_setting_exists(page: Path) -> None:
    """An override that stands behind a recipe has to go with that one, others with some recipe."""
    for words in commands(page.read_text()):
        overrides = [word.replace("%a", "1") for word in words if _OVERRIDE.match(word)]
        recipe = after(words, "--config")
        has_plugin = words[0].startswith("SHIP_DS_PLUGINS=")
        if recipe in recipe_names() and not has_plugin and not is_an_error(page, words):
            assert recipe is not None
            load_config(recipe, overrides)
    for override in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+=[^`. ]+)`", page.read_text()):
        if override == "section.key=value":
            continue
        assert any(takes(recipe, override) for recipe in recipe_names()), override


def is_an_error(page: Path, words: list[str]) -> bool:
    """Whether the page shows this command for the error that it ends with."""
    return f"$ {shlex.join(words)}\n    ship-ds: " in page.read_text()


def takes(recipe: str, override: str) -> bool:
    """Whether a recipe has the key."""
    try:
        load_config(recipe, [override])
    except UserError as error:
        return "unknown key" not in str(error)
    return True


@every_page
def test_every_file_exists(page: Path) -> None:
    text = page.read_text()
    paths = set(_PATH.findall(text))
    modules = re.findall(r"(?:-m (?:-- )?|SHIP_DS_PLUGINS=)((?:ship_ds|tests)[.\w]*)", text)
    for module in modules:
        path = module.replace(".", "/")
        assert (REPOSITORY / f"{path}.py").exists() or (REPOSITORY / path).is_dir(), module
    for path in paths:
        assert (REPOSITORY / path).exists() or (page.parent / path).exists(), path
    rules = (REPOSITORY / "Makefile").read_text()
    for words in commands(text):
        if words[0] == "make":
            assert not [word for word in words[1:] if "=" not in word and f"\n{word}:" not in rules]


@every_page
def test_every_option_of_a_tool_exists(page: Path) -> None:
    for words in commands(page.read_text()):
        if words[0] == "python" and words[1].startswith("tools/"):
            source = (REPOSITORY / words[1]).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in source, (words[1], option)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in headings}


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def definitions(path: Path) -> set[str]:
    """Classes, functions and methods of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return names


@every_page
def test_every_function_is_where_a_page_says(page: Path) -> None:
    for file, name in re.findall(r"`(ship_ds/[\w/]+\.py): ([\w.]+)`", page.read_text()):
        assert name in definitions(REPOSITORY / file), (file, name)


def test_python_of_readme_runs(one_rank_run: Path) -> None:
    """On a run of the smoke recipe, which has learnt nothing: every call has to exist."""
    [code] = re.findall(r"```python\n(.+?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exec(code.replace("runs/quickstart", str(one_rank_run)), {})


def printed_errors() -> list[tuple[str, str]]:
    """The commands of docs/troubleshooting.md with the line that each ends with."""
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^    \$ ship-ds (.+)\n    (ship-ds: .+)$", text, re.MULTILINE)


@pytest.mark.parametrize(("command", "line"), printed_errors())
def test_errors_are_as_printed(
    command: str,
    line: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)) == 2
    assert capsys.readouterr() == ("", line + "\n")


def files_of_the_tree() -> set[str]:
    """The files that the tree names."""
    names: set[str] = set()
    parents: list[str] = []
    for line in TREE.read_text().splitlines():
        match = _TREE_LINE.match(line)
        if match is None:
            continue
        parents = [*parents[: len(match["indent"]) // 2], match["name"]]
        if not match["name"].endswith("/"):
            names.add("".join(parents))
    return names


def test_tree_names_every_file() -> None:
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    whole_folders = tuple(name[:-2] for name in files_of_the_tree() if name.endswith("/**"))
    files = {
        name for name in names if not name.endswith("__init__.py") and (REPOSITORY / name).exists()
    }
    inside = {folder for folder in whole_folders for name in files if name.startswith(folder)}
    named = {name for name in files if not name.startswith(whole_folders)}
    assert files_of_the_tree() == named | {f"{folder}**" for folder in inside}


def test_readme_is_short_and_its_numbers_are_in_the_results() -> None:
    readme, results = ((REPOSITORY / page).read_text() for page in ("README.md", "docs/results.md"))
    assert len(readme.splitlines()) <= 160
    scores = re.findall(r"0\.\d{3}", readme)
    assert len(scores) > 20
    assert not [score for score in scores if score not in results]
