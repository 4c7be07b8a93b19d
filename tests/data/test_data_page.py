"""Every format's example in docs/data.md is read by its reader, and no format is without one."""

import re
from pathlib import Path

import pytest

from ship_ds.data.readers import FORMATS, detect_format, read_tasks
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^### ([\w-]+)\n(.*?)(?=^##)", PAGE, re.M | re.S))


def test_the_page_has_every_format() -> None:
    assert list(SECTIONS) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_a_format_is_read(name: str, tmp_path: Path) -> None:
    blocks = re.findall(r'```json title="(.*?)"\n(.*?)```', SECTIONS[name], re.S)
    for file, text in blocks:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert blocks and detect_format(tmp_path) == name
    task, *others = read_tasks(tmp_path, name)
    assert task.instruction and len(task.examples) == (1 if name == "plain-text" else 2)
    if name == "messages":
        assert [(other.instruction, len(other.examples)) for other in others] == [
            ("Name a colour.", 1),
            ("Say the opposite.", 2),
        ]
    else:
        assert not others
