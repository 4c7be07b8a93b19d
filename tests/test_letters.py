"""One letter has one meaning: every legend says what docs/architecture.md says, and no tensor's
suffix uses a letter that its file's legend lacks."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted((REPOSITORY / "ship_ds").rglob("*.py"))
_ROW = re.compile(r"^\| ([A-Z]) \| (.+?) \|$", re.MULTILINE)
_LEGEND = re.compile(r"Letters:(.*?)\.(?:\s|$)", re.DOTALL)
_SUFFIX = re.compile(r"^_*[a-z]\w*_([0-9A-Z]*[A-Z])$")


def table() -> dict[str, str]:
    """The meaning of each letter in docs/architecture.md."""
    return dict(_ROW.findall((REPOSITORY / "docs" / "architecture.md").read_text()))


def legend(tree: ast.Module) -> dict[str, str]:
    """The letters of a module's docstring.

    "Letters: T tasks, Z latent size." -> {"T": "tasks", "Z": "latent size"}
    """
    match = _LEGEND.search(ast.get_docstring(tree) or "")
    if match is None:
        return {}
    items = (" ".join(item.split()) for item in match[1].split(","))
    return dict((item[:1], item[2:]) for item in items)


def suffixes(tree: ast.Module) -> set[str]:
    """Every suffix of letters that a name in the module ends with, such as TZ of mean_TZ, without
    the ones in it: Z of latent_1Z."""
    names = set()
    for node in ast.walk(tree):
        names.update(
            value
            for field in ("id", "attr", "arg", "name")
            if isinstance(value := getattr(node, field, None), str)
        )
    return {re.sub(r"\d", "", match[1]) for match in map(_SUFFIX.match, names) if match}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_letters_mean_what_the_table_says(path: Path) -> None:
    tree = ast.parse(path.read_text())
    letters = legend(tree)
    assert letters.items() <= table().items()
    named = {letter for suffix in suffixes(tree) for letter in suffix}
    assert named <= letters.keys()
    # Alone: in a shape such as (T, Z), or as a size.
    alone = re.findall(
        r"(?<![A-Za-z0-9_])[A-Z](?![A-Za-z0-9_])", _LEGEND.sub("", path.read_text(), 1)
    )
    assert letters.keys() <= named | set(alone), "a letter that the file does without"


def test_table_is_read() -> None:
    assert len(table()) == 26
    assert legend(ast.parse('"""Words.\n\nLetters: T tasks, Z latent\nsize.\n"""')) == {
        "T": "tasks",
        "Z": "latent size",
    }
    assert suffixes(ast.parse("mean_TZ = self.noise_TZ + f(lora_a_TRI=MAX_K)")) == {"TZ", "TRI"}
