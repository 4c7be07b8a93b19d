"""README's tree names every tracked file of the project once, and no other."""

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_LINE = re.compile(r"^    (?P<indent> *)(?P<name>[\w.{},*-]+/?)(?:  +\S.*)?$")


def named_in_readme() -> set[str]:
    text = (REPOSITORY / "README.md").read_text().split("## The tree")[1]
    found: set[str] = set()
    parents: list[str] = []
    for match in filter(None, map(_LINE.match, text.splitlines())):
        depth = len(match["indent"]) // 2
        parents = [*parents[:depth], match["name"]]
        if not match["name"].endswith("/"):
            found.add("".join(parents))
    return found


def test_tree_is_true() -> None:
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = {
        name for name in names if not name.endswith("__init__.py") and (REPOSITORY / name).exists()
    }
    assert named_in_readme() == files
