"""The base of all explanations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from regard.notation import written
from regard.steer.metrics import Metric

Inputs = Tensor | Mapping[str, Any]


class Explanation(ABC):
    """What each token of an input has to do with what a model makes of it; a subclass is one method with its settings.

    It keeps nothing of a run, so that one object explains any number of them.
    """

    def __repr__(self) -> str:
        return written(self)

    @abstractmethod
    def explain(self, model: Module, inputs: Inputs, metric: Metric | None = None) -> Tensor:
        """Run a model and explain what it says.

        Args:
            model: as for `regard.watch`, in evaluation mode.
            inputs: its arguments by name, or its one tensor.
            metric: what is explained, a function of what the model returns, of one number for each text or one for all, such
                as `regard.logit_difference`; methods that look at attention alone need none.

        Returns:
            (batch, tokens): the larger, the more the token has to do with it.
        """


def run(model: Module, inputs: Inputs) -> Any:
    """What the model returns."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
