"""Files and folders that are there whole or not at all, whatever happens in between."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.bundle import frozen_bases, write_bundle
from ship_ds.config import load_config
from ship_ds.errors import UserError
from ship_ds.files import (
    Manifest,
    disk_full_error,
    new_folder,
    part_of,
    publish,
    recover,
    refused_paths,
    replace_folder,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.prompt import describe_roles
from tests.conftest import start


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), whole_file(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    write_text(path, "whole\n", shared=True, durable=False)
    assert path.read_text() == "whole\n" and names(path.parent) == ["report.json"]


def test_a_folder_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    for content in ("old", "new"):
        with whole_folder(folder) as part:
            assert part == part_of(folder)
            (part / "a").write_text(content)
    with pytest.raises(RuntimeError), whole_folder(folder) as part:
        raise RuntimeError
    assert (folder / "a").read_text() == "new" and names(tmp_path) == ["bundle"]
    with pytest.raises(UserError, match="bundle: already there; name a new folder or remove it"):
        new_folder(folder)


def raised_by(error: BaseException, cause: BaseException | None) -> BaseException:
    try:
        raise error from cause
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None, "error"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), None, "error"),
        (RuntimeError("Error building extension"), OSError(errno.ENOSPC, "full"), "cause"),
        (RuntimeError("ld: final link failed: No space left on device"), None, "error"),
        (OSError(errno.EACCES, "Permission denied"), None, ""),
        (RuntimeError("Error building extension"), ValueError("a space is left"), ""),
    ],
)
def test_a_full_disk_is_known_by_its_number_and_by_its_words(
    error: BaseException, cause: BaseException | None, expected: str
) -> None:
    found = disk_full_error(raised_by(error, cause))
    assert found is {"error": error, "cause": cause, "": None}[expected]


def test_a_folder_set_aside_counts_as_there(tmp_path: Path) -> None:
    (tmp_path / "bundle.replaced").mkdir()
    with pytest.raises(UserError, match="already there"):
        new_folder(tmp_path / "bundle")
    assert names(tmp_path) == ["bundle"]


def test_a_reader_between_the_two_renames_does_not_stop_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, folder, rename = tmp_path / "bundle.part", tmp_path / "bundle", Path.rename
    for path, content in ((part, "new"), (folder, "old")):
        path.mkdir()
        (path / "a").write_text(content)
    readers = [folder]

    def rename_while_others_read(path: Path, target: Path) -> Path:
        if path == part and readers:
            recover(readers.pop())
            assert (folder / "a").read_text() == "old"
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_while_others_read)
    publish(part, folder)
    assert (folder / "a").read_text() == "new" and names(tmp_path) == ["bundle"]


def test_the_old_folder_is_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "bundle.part", tmp_path / "bundle")
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "sub/b is missing"),
        (lambda path: path.write_text("longer"), "sub/b has 6 bytes instead of 1"),
        (lambda path: path.write_text("c"), "sub/b is not the file that was written"),
    ],
)
def test_a_manifest_names_the_first_file_that_is_not_as_written(
    damage: object, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_text("a")
    (tmp_path / "sub" / "b").write_text("b")
    Manifest.of(tmp_path).write(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert list(manifest.files) == ["a", "sub/b"] and manifest.problem(tmp_path) is None
    damage(tmp_path / "sub" / "b")  # type: ignore[operator]
    assert manifest.problem(tmp_path) == problem and manifest.problem(tmp_path, ["a"]) is None


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1}', '{"a": {"bytes": 1}}', '{"a": {"bytes": 1, "sha256": 2}}']
)
def test_what_is_no_manifest_is_said(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^manifest\.json is missing$"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"^manifest\.json: .*(JSON|expected a)"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "a/b"])
def test_a_name_that_no_file_can_have_is_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    listed = {name: {"bytes": 1, "sha256": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    assert Manifest.read(tmp_path).problem(tmp_path) == f"{name} is missing"


def test_a_path_that_the_system_refuses_is_one_line_and_other_faults_stay(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / ("a" * 300), "File name too long: name another"),
        (tmp_path / "file" / "below", "Not a directory: name another"),
    ):
        with pytest.raises(UserError, match=reason) as raised, refused_paths():
            path.open("w")
        assert len(str(raised.value)) < 400
    with pytest.raises(FileNotFoundError), refused_paths():
        (tmp_path / "nowhere").read_text()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/old and FOLDER/new, two bundles that know different instructions."""
    folder = tmp_path_factory.mktemp("bundles")
    config = load_config("quickstart-smoke", [])
    torch.manual_seed(0)
    model = build_ship(config.model, LoadedWeights())
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    bases, prompt_format = frozen_bases(config), describe_roles(vars(model.collator.prompts))
    for name in ("old", "new"):
        write_bundle(folder / name, trainable, config, prompt_format, bases, [name], [])
    return folder


@pytest.mark.slow
def test_a_bundle_is_there_after_a_kill_at_any_moment(bundles: Path, tmp_path: Path) -> None:
    done = start(
        ["-m", "tests.killed_publish", str(bundles / "old"), str(bundles / "new"), str(tmp_path)]
    )
    assert done.returncode == 0, done.stderr
    left: dict[tuple[str, ...], str] = {}
    for moment in range(1, int(done.stdout) + 1):
        run = tmp_path / str(moment)
        state = (*names(run), "")
        # Ship opens one of every state that a kill left; all others are compared by their hashes.
        if state not in left:
            ship = Ship.from_run(run)
            left[state] = ship.known[0]
        recover(run / "bundle")
        assert Manifest.read(run / "bundle").problem(run / "bundle") is None
        known = json.loads((run / "bundle" / "known_instructions.json").read_text())
        assert known in (["old"], ["new"])
        with whole_folder(run / "bundle") as part:
            shutil.copytree(bundles / "new", part, dirs_exist_ok=True)
        assert names(run) == ["bundle"]
    between = {state for state in left if "bundle" not in state}
    assert between == {("bundle.part", "bundle.replaced", "")}
    assert set(left.values()) == {"old", "new"}
