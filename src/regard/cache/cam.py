"""What leaves the window stays in the values of those that follow."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cache.merge import Merge
from regard.cache.rest import Rest
from regard.cache.streaming_llm import StreamingLLM


@dataclass(frozen=True, kw_only=True)
class CaM(StreamingLLM):
    """First and last tokens; while decoding, what goes is merged into the values of those after it, as `Merge` says.

    `StreamingLLM` with ``rest=Merge(prompt=False)``: the authors drop what goes after a prompt.

    Args:
        budget, when, rest, sinks: as for `StreamingLLM`.

    Y. Zhang et al. (2024), CaM: Cache Merging for Memory-efficient LLMs Inference.

    >>> import regard
    >>> print(regard.cache.CaM(budget=256, rest=regard.cache.Merge(prompt=False, neighbours=16)))
    CaM(budget=256, rest=Merge(neighbours=16, prompt=False))
    """

    rest: Rest = Merge(prompt=False)
