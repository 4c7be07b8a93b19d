"""Files of instructions and latents, and what is said about bad ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.export.requests import read_instructions, read_latents, write_latents
from ship_ds.inference import latents


def test_lines_are_named_by_number_and_words(tmp_path: Path) -> None:
    (tmp_path / "i.txt").write_text("reverse the list\n\nKeep > 4!\n")
    found = read_instructions(tmp_path / "i.txt")
    assert [(r.name, r.instruction) for r in found] == [
        ("00001-reverse-the-list", "reverse the list"),
        ("00003-keep-4", "Keep > 4!"),
    ]


def test_rows_may_name_themselves(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text(
        '{"instruction": "a\\nb", "id": "x.1"}\n{"instruction": "c"}\n'
    )
    found = read_instructions(tmp_path / "i.jsonl")
    assert [(r.name, r.instruction) for r in found] == [("x.1", "a\nb"), ("00002-c", "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a"}\n{"text": "b"}\n', r"i\.jsonl:2: expected a JSON object"),
        ("[1]\n", r"i\.jsonl:1: expected a JSON object"),
        ('{"instruction": "a", "id": "../x"}\n', r"becomes a folder's name"),
        (
            '{"instruction": "a", "id": "x"}\n{"instruction": "b", "id": "x"}\n',
            "'x' is there twice",
        ),
        ('{"instruction": 3}\n', "expected text"),
        ('{"instruction": "a", "instruction": "b"}\n', "the key 'instruction' is there twice"),
        ('{"instruction": "a\\ud800"}\n', "half a surrogate pair"),
        ('{"instruction": "a", "id": "' + "x" * 300 + '"}\n', "200 of them at most"),
        ('{"instruction": "a", "id": "x.part"}\n', "neither .part nor .replaced"),
        ('{"instruction": "a", "id": "/etc/x"}\n', "becomes a folder's name"),
        ('{"instruction": "a", "id": "x\\u0000"}\n', "becomes a folder's name"),
        ("\n", "has no instructions"),
    ],
)
def test_bad_rows_are_one_line_with_their_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_instructions(tmp_path / "i.jsonl")


def test_a_byte_order_mark_is_no_part_of_an_instruction(tmp_path: Path) -> None:
    (tmp_path / "i.txt").write_bytes("\ufeffreverse\r\nsort\u2028it\r\n".encode())
    found = read_instructions(tmp_path / "i.txt")
    assert [one.instruction for one in found] == ["reverse", "sort\u2028it"]
    (tmp_path / "i.jsonl").write_bytes('\ufeff{"instruction": "a\u2028b"}\r\n'.encode())
    assert read_instructions(tmp_path / "i.jsonl")[0].instruction == "a\u2028b"
    (tmp_path / "i.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"i\.txt: byte 3: not UTF-8"):
        read_instructions(tmp_path / "i.txt")


def test_latents_come_back_with_their_instructions(tmp_path: Path) -> None:
    latent_TZ = torch.randn(2, 5)
    write_latents(tmp_path / "z.safetensors", latent_TZ, "digest", ["reverse", None])
    one, two = read_latents(tmp_path / "z.safetensors", "digest", 5)
    assert (
        one.instruction == "reverse"
        and one.latent_Z is not None
        and one.latent_Z.equal(latent_TZ[0])
    )
    assert two.instruction is None and two.name == "00001-latent"


def test_latents_of_another_run_or_size_are_refused(tmp_path: Path) -> None:
    write_latents(tmp_path / "z.safetensors", torch.full((1, 5), float("nan")), "digest", [None])
    with pytest.raises(UserError, match="another run's weights"):
        read_latents(tmp_path / "z.safetensors", "other", 5)
    for size in (4, 5):
        with pytest.raises(UserError, match=r"\(1, 5\); expected finite numbers"):
            read_latents(tmp_path / "z.safetensors", "digest", size)
    save_file({"latent_TZ": torch.ones(2, 5)}, tmp_path / "z.safetensors", {"instructions": "[1]"})
    with pytest.raises(UserError, match="expected a list of 2 texts or nulls"):
        read_latents(tmp_path / "z.safetensors", "digest", 5)
    (tmp_path / "z.safetensors").write_text("nothing")
    with pytest.raises(UserError, match="not a latent file"):
        read_latents(tmp_path / "z.safetensors", "digest", 5)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.int64, "I64"), (torch.bool, "BOOL")]
)
def test_latents_that_are_no_floats_of_numpy_s_are_one_line(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    save_file({"latent_TZ": torch.ones(2, 5, dtype=dtype)}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match=f"latent_TZ is {kind}; expected F32, F16, F64"):
        read_latents(tmp_path / "z.safetensors", "digest", 5)


def test_latents_of_other_floats_become_fp32(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float64):
        save_file({"latent_TZ": torch.full((1, 5), 0.5, dtype=dtype)}, tmp_path / "z.safetensors")
        [request] = read_latents(tmp_path / "z.safetensors", "digest", 5)
        assert request.latent_Z is not None and request.latent_Z.equal(torch.full((5,), 0.5))
    large = torch.full((1, 5), 1e300, dtype=torch.float64)
    save_file({"latent_TZ": large}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="expected finite numbers"):
        read_latents(tmp_path / "z.safetensors", "digest", 5)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["deduce", "--file", "{file}"], "{file}:2: instruction: 'quux' is not in"),
        (
            ["convert", "--instruction", "reverse the list", "--instruction", "quux"],
            "--instruction:2: instruction: 'quux' is not in",
        ),
        (
            ["compose", "--part", "1", "reverse the list", "--part", "1", "quux"],
            "--part 2: instruction: 'quux' is not in",
        ),
        (
            ["deduce", "reverse the list", "--probe", "1 2", "--probe", "quux"],
            "--probe: input 2: 'quux' is not in",
        ),
    ],
    ids=["file", "convert", "compose", "probe"],
)
def test_what_the_encoder_cannot_read_is_named_before_anything_is_made(
    arguments: list[str],
    place: str,
    one_rank_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "i.txt", tmp_path / "out"
    file.write_text("reverse the list\nreverse the quux\n")
    verb, *given = [one.format(file=file) for one in arguments]
    run = [str(one_rank_run)] if verb == "convert" else ["--run", str(one_rank_run)]
    assert cli.main([verb, *run, *given, "--out", str(out), "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"ship-ds: {place.format(file=file)}")
    assert not list(tmp_path.glob("out*/*")), "no adapter, and no part of one"


def test_a_file_of_texts_far_from_training_is_warned_of(
    one_rank_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the one that is farther, where the bound lies between the two."""
    file = tmp_path / "i.txt"
    file.write_text("reverse the list\n\nlist list list list the the the the the\n")
    ship = Ship.from_run(one_rank_run)
    found = {one.place: ship.familiarity(str(one.instruction)) for one in read_instructions(file)}
    (near, far) = sorted((one.isolation, place) for place, one in found.items() if one is not None)
    assert near[0] < far[0]
    monkeypatch.setattr(latents, "FAR_QUANTILE", (near[0] + far[0]) / 2)
    run = ["--run", str(one_rank_run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["deduce", "--file", str(file), *run]) == 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("ship-ds: 1 of 2 instructions are far from the instructions this run")
    assert f"({far[1]})" in said


def test_latents_that_git_lfs_keeps_elsewhere_are_told_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976\n")
    with pytest.raises(UserError, match=r"z\.safetensors: a Git LFS pointer.*`git lfs pull`"):
        read_latents(path, "bundle", 8)
