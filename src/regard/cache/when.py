"""When a policy chooses: after a prompt, or while decoding too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from regard.cache._part import Part


class When(Part, ABC):
    """The calls after which a policy chooses which entries stay."""

    @property
    def while_decoding(self) -> bool:
        """Whether decoding steps are among them."""
        return False

    @abstractmethod
    def due(self, tokens: int, steps: int) -> bool:
        """Whether a call with this many new tokens is one, the ``steps``-th decoding step if it is a step."""


@dataclass(frozen=True)
class AfterPrompt(When):
    """Choose when a prompt, or a further turn of several tokens, has been read.

    >>> import regard
    >>> print(regard.cache.StreamingLLM(budget=256, when=regard.cache.AfterPrompt()))
    StreamingLLM(budget=256, when=AfterPrompt())
    """

    def due(self, tokens: int, steps: int) -> bool:
        """After several tokens."""
        return tokens > 1


@dataclass(frozen=True)
class Every(When):
    """Choose at every so many-th decoding step, and after a prompt or a turn.

    Args:
        steps: 1 for every step.
        prompt: whether after a prompt or a turn too.

    Raises:
        ValueError: less than 1 step.

    >>> import regard
    >>> print(regard.cache.SnapKV(budget=1024, when=regard.cache.Every(16)))
    SnapKV(budget=1024, when=Every(16))
    """

    steps: int
    prompt: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Every: steps must be a number of decoding steps of at least 1, got {self.steps!r}")

    @property
    def while_decoding(self) -> bool:
        """True: that is what it is for."""
        return True

    def due(self, tokens: int, steps: int) -> bool:
        """After several tokens if ``prompt`` says so, and at every so many-th step."""
        return self.prompt if tokens > 1 else steps > 0 and steps % self.steps == 0


@dataclass(frozen=True)
class Never(When):
    """Choose nothing, at no call: of policies that drop nothing.

    >>> import regard
    >>> print(regard.cache.KeepAll().when)
    Never()
    """

    def due(self, tokens: int, steps: int) -> bool:
        """After no call."""
        return False
