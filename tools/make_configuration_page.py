"""Write docs/configuration.md anew from the schema; a test fails while it is not what this writes.

python tools/make_configuration_page.py
"""

from pathlib import Path

from ship_ds.schema import SettingGroup, SettingRow, groups

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_HEAD = """# Configuration

Every setting, its type, its default and what it means. `ship-ds config` prints the same, `ship-ds
config model.encoder` a part of it; this page is written by `tools/make_configuration_page.py`.

A config is a YAML file: one of the recipes, which `ship-ds recipes` lists, or a file of your own.
`section.key=value` on the command line overrides it; the value is read as YAML, and the last one of
a key wins:

    ship-ds train --config quickstart training.steps=10 model.hypernetwork='{kind: soft_prompt}'

An unknown key, a value of another type and a pair that cannot be are errors: one line, before
anything is loaded. Where a section has kinds, `kind:` chooses one, and the keys are that one's.
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(map(_section, groups()))


def _section(group: SettingGroup) -> str:
    rows = "".join(map(_row, group.settings))
    table = f"| key | type | default | meaning |\n|---|---|---|---|\n{rows}" if rows else ""
    parts = [f"\n## {group.title}\n", group.about and f"\n{group.about}\n", table and f"\n{table}"]
    return "".join(part for part in parts if part)


def _row(setting: SettingRow) -> str:
    cells = (f"`{setting.name}`", setting.type, f"`{setting.default}`", setting.meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(f"{PAGE}: written")


if __name__ == "__main__":
    main()
