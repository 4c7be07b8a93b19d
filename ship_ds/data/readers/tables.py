"""Parquet and arrow files, read through `datasets`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ship_ds.data.readers.files import compression_of, kind_of, opened
from ship_ds.data.task import DataError
from ship_ds.safetensors_header import refuse_pointer_file


def table(file: Path, columns: Sequence[str] = ()) -> Any:
    """A parquet or arrow file in memory, with these columns alone where it has all of them.

    Raises:
        DataError: it cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    if compression := compression_of(file):
        raise DataError(f"{file}: {kind_of(file)[1:]} is read as it is: unpack the {compression}")
    opened(file).close()
    refuse_pointer_file(file)
    level = datasets.logging.get_verbosity()
    # It logs what it raises as well.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        # else every file read is copied to the user's home, and stays there
        with tempfile.TemporaryDirectory() as cache:
            if kind_of(file) == ".arrow":
                rows = datasets.Dataset.from_file(str(file), in_memory=True)
            else:
                rows = datasets.Dataset.from_parquet(
                    str(file), cache_dir=cache, keep_in_memory=True
                )
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{file}: cannot be read as {kind_of(file)[1:]}: {cause}; save it again"
        ) from None
    finally:
        datasets.logging.set_verbosity(level)
    has_all = columns and set(columns) <= set(rows.column_names)
    return rows.select_columns(list(columns)) if has_all else rows
