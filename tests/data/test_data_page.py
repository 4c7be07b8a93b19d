"""Every format's example in docs/data.md is read by its reader, and no format is without one."""

import json
import re
from pathlib import Path

import pytest

from ship_ds.data.readers import FORMATS, detect_format, read_tasks
from ship_ds.data.task import DataError, read_error
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


def test_formats_of_tasks_of_one_example_are_named_where_it_is_said() -> None:
    names = [name for name, one in FORMATS.items() if hasattr(one, "MIN_EXAMPLES_PER_TASK")]
    configuration = (REPOSITORY / "docs" / "configuration.md").read_text()
    (said,) = re.findall(r"null: 1 in the formats (.*?), 2 in the others", configuration)
    assert re.split(", | and ", said) == names
    (said,) = re.findall(r"The formats\s+(.*?) keep such tasks", PAGE, re.S)
    assert re.findall(r"`(.*?)`", said) == names


def test_the_error_that_is_quoted_is_what_is_said(tmp_path: Path) -> None:
    instances = [{"id": str(i), "input": "a", "output": ["b"]} for i in range(3)]
    values = {"Definition": ["k"], "Positive Examples": [], "Contributors": ["x"]}
    values["Instances"] = [*instances, {"id": "3", "input": "a", "output": 3}]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.json").write_text(json.dumps(values))
    with pytest.raises(DataError) as raised:
        read_tasks(tmp_path / "tasks", "natural-instructions")
    line = str(raised.value).removeprefix(f"{tmp_path}/")
    assert f"`{line}`" in PAGE
    assert f"`{line}`" in " ".join((read_error.__doc__ or "").split())
