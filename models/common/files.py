"""Writing files: all or nothing, and with errors that name --out."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from models.common.errors import UserError


@contextlib.contextmanager
def writing(path: str | Path, kind: str = "file") -> Iterator[None]:
    """Turns an OSError of writing to the path of --out, a file or a folder, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot write there ({error.strerror}); name another {kind}"
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content so that a crash leaves either the old or the new content."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", newline="") as file:
        file.write(text)
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
