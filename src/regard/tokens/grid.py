"""Grids of image and video tokens: which token stands for which patch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.tokens.positions import Positions, indices


@dataclass(frozen=True)
class Grid:
    """Tokens that stand for patches of an image or a video: frame after frame, row after row, from left to right.

    What it returns are positions, for the keys and queries of any statistic and edit.

    Args:
        height: rows of patches.
        width: patches in a row.
        frames: of a video.
        start: the position of the first token, as ``locate`` or `image_tokens` finds it; a class token stands before it.
        row_end: tokens after each row that stand for no patch, as Pixtral's line breaks and LLaVA-NeXT's newlines.

    Raises:
        ValueError: a size below 1, a start or row end below 0.

    >>> grid = Grid(2, 3, start=1)
    >>> len(grid), grid.position(1, 0), grid.place(6)
    (6, 4, (0, 1, 2))
    """

    height: int
    width: int
    frames: int = 1
    start: int = 0
    row_end: int = 0

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("frames", 1), ("start", 0), ("row_end", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Grid needs {name} to be an int of at least {least}, got {value!r}")

    def __len__(self) -> int:
        return self.frames * self.height * self.width

    def position(self, row: int, column: int, frame: int = 0) -> int:
        """The position of one patch; negative numbers count from the last row, column and frame.

        Raises:
            IndexError: a row, column or frame that is not there.
        """
        (found,) = self.positions(row, column, frame)
        return found

    def place(self, position: int) -> tuple[int, int, int]:
        """Frame, row and column of the patch at a position.

        Raises:
            IndexError: a position before or after the grid, or at the end of a row, where no patch stands.
        """
        line, column = divmod(position - self.start, self.width + self.row_end)
        if not 0 <= line < self.frames * self.height or column >= self.width:
            raise IndexError(f"no patch of {self} stands at position {position}")
        return line // self.height, line % self.height, column

    def positions(
        self, rows: Positions | None = None, columns: Positions | None = None, frames: Positions | None = None
    ) -> list[int]:
        """The positions of all patches in some rows, columns and frames; of every one by default.

        Raises:
            IndexError: a row, column or frame that is not there.

        >>> Grid(2, 3).positions(columns=[0, -1])
        [0, 2, 3, 5]
        """
        down = self._numbers(rows, self.height, "rows")
        across = self._numbers(columns, self.width, "columns")
        pitch = self.width + self.row_end
        return [
            self.start + (frame * self.height + row) * pitch + column
            for frame in self._numbers(frames, self.frames, "frames")
            for row in down
            for column in across
        ]

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        *,
        image: tuple[int, int] | None = None,
        frames: Positions | None = None,
    ) -> list[int]:
        """The positions of the patches that a box touches.

        Args:
            left: its left edge, in pixels of the image or as a share of its width; as all edges.
            top: its upper edge, which is smaller than the lower one.
            right: its right edge.
            bottom: its lower edge.
            image: height and width of the image in pixels, of which the grid covers all; None where the edges are shares.
            frames: of a video, where the box is; in all by default.

        Raises:
            ValueError: a box without an inside, or beyond the image.

        >>> Grid(4, 4).box(0.5, 0, 1, 0.25)
        [2, 3]
        >>> Grid(4, 4).box(10, 10, 30, 20, image=(56, 56))
        [0, 1, 2, 4, 5, 6]
        """
        tall, wide = (1, 1) if image is None else image
        unit = "as shares of its size" if image is None else f"in an image of {wide}×{tall} pixels"
        if not (0 <= left < right <= wide and 0 <= top < bottom <= tall):
            raise ValueError(
                f"a box goes from left to right and from top to bottom within the image; got ({left}, {top}) to "
                f"({right}, {bottom}) {unit}"
            )
        down = _touched(top, bottom, tall, self.height)
        return self.positions(down, _touched(left, right, wide, self.width), frames)

    def border(self, thickness: int = 1) -> list[int]:
        """The positions of the patches at most so many from an edge of the image, in all frames.

        Raises:
            ValueError: a thickness below 1.

        >>> Grid(3, 3).border()
        [0, 1, 2, 3, 5, 6, 7, 8]
        """
        if thickness < 1:
            raise ValueError(f"a border is at least 1 patch thick, got {thickness}")
        inner_rows = range(thickness, self.height - thickness)
        inner_columns = range(thickness, self.width - thickness)
        inside = self.positions(inner_rows, inner_columns) if inner_rows and inner_columns else []
        return sorted(set(self.positions()) - set(inside))

    def _numbers(self, where: Positions | None, number: int, what: str) -> list[int]:
        return list(range(number)) if where is None else indices(where, number, what, unit=what).tolist()


def _touched(low: float, high: float, size: int, patches: int) -> range:
    """The patches of which a part lies between two edges; less than a billionth is taken for rounding."""
    first = min(math.floor(low * patches / size + 1e-9), patches - 1)
    return range(first, max(math.ceil(high * patches / size - 1e-9), first + 1))
