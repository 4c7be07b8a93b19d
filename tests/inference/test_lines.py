"""JSON lines that the verbs read, from files that other programs wrote."""

from pathlib import Path

import pytest

from ship_ds.errors import UserError
from ship_ds.inference.lines import read_inputs, read_pairs


def test_pairs_of_other_machines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"input": "3\u20289", "target": "  x"}\r\n\r\n'.encode())
    assert read_pairs(str(path)) == [("3\u20289", "  x")]
    path.write_bytes('\ufeff3 9\r\n    x = 1\n[3, 9]\r{"input": "a"}'.encode())
    assert read_inputs(str(path)) == ["3 9", "    x = 1", "[3, 9]", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"input": "a", "target": 9}', "line 1: target: expected a string, got int"),
        (b'{"input": "a", "input": "b", "target": "c"}', "line 1: the key 'input' is there twice"),
        (b'{"input": "a\\udc00", "target": "c"}', "line 1: input: letter 1 is half a surrogate"),
        (b'{"input": ' + b"9" * 5000 + b"}", "line 1: a number has thousands of digits"),
        (b"caf\xe9", "byte 3: not UTF-8"),
        (b" \n", "is empty"),
    ],
)
def test_what_cannot_be_read_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pairs(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
