"""The trained language model that ships with the package."""

from regard._callable import make_callable
from regard.mini._mini import mini, name, path

__all__ = ["mini", "name", "path"]

make_callable(__name__, mini)
