"""A file that can tell that it is what was written: the SHA-256 of its content, in a line after its end."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

_LINE = b"\nregard sha256 %s\n"
_SEAL = re.compile(rb"\nregard sha256 ([0-9a-f]{64})\n\Z")


def seal(path: Path) -> None:
    """Add the line; readers of HDF5 do not mind what comes after a file's end."""
    digest = sha256(path.read_bytes()).hexdigest()
    with path.open("ab") as file:
        file.write(_LINE % digest.encode())


def check(path: Path) -> None:
    """Refuse a file whose content is not that of its line; one without a line was written by others, or cut off.

    Raises:
        ValueError: the content was changed.
    """
    content = path.read_bytes()
    found = _SEAL.search(content)
    if found and sha256(content[: found.start()]).hexdigest().encode() != found[1]:
        raise ValueError(f"{path} is damaged: its content is not what was saved. Save it again, or take another copy.")
