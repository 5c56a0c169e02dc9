"""A second run of a model beside ``generate``, for processors that compare its scores with those of the first."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.steer.vision._prompt import Inputs, read_prompt
from regard.tokens import decoder_layers
from regard.watch import Rows, watch

Around = Callable[[], AbstractContextManager[Any]]


class Branch:
    """Scores the next token of what ``generate`` has written so far, from inputs or under conditions of its own."""

    def __init__(self, model: Module, inputs: Inputs, around: Around = nullcontext) -> None:
        self.prompt = read_prompt(model, inputs)
        self._model: Any = model
        self._inputs, self._around = dict(inputs), around
        self._seen: Tensor | None = None
        self._cache: Any = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """(batch, vocabulary) in float32."""
        if torch.equal(input_ids, self.prompt.ids):
            arguments: Inputs = self._inputs
        elif self._seen is not None and torch.equal(input_ids[:, :-1], self._seen):
            arguments = self._continued(input_ids)
        else:
            raise ValueError(
                f"a processor made for a prompt of shape {tuple(self.prompt.ids.shape)} got a text of shape "
                f"{tuple(input_ids.shape)} that does not go on with it token by token; make one for each prompt, with "
                "num_beams=1 and one text for each prompt"
            )
        one = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "use_cache": True}
        with self._around():
            told = self._model.generate(**arguments, **one, output_logits=True, return_dict_in_generate=True)
        self._seen, self._cache = input_ids.clone(), told.past_key_values
        scores: Tensor = told.logits[0].float()
        return scores

    def _continued(self, input_ids: Tensor) -> Inputs:
        """What ``generate`` goes on from: the text so far and the cache, which holds the image."""
        batch, start = self.prompt.ids.shape
        added = torch.zeros(batch, input_ids.shape[1] - start, dtype=torch.long, device=input_ids.device)
        kinds = {
            name: torch.cat([value, added.to(value)], dim=1)
            for name, value in self._inputs.items()
            if isinstance(value, Tensor) and value.shape == self.prompt.ids.shape
        }
        mask = torch.cat([self.prompt.real.long(), added + 1], dim=1)
        return kinds | {"input_ids": input_ids, "attention_mask": mask, "past_key_values": self._cache}


def plausible(scores: Tensor, original: Tensor, beta: float) -> Tensor:
    """The scores of tokens that the original run gives at least the part β of its likeliest token's probability."""
    least = math.log(beta) + original.amax(dim=-1, keepdim=True)
    return scores.masked_fill(original < least, -math.inf)


def check_beta(name: str, beta: float) -> None:
    if not 0 < beta <= 1:
        raise ValueError(f"{name} needs beta to be greater than 0 and at most 1, got {beta}")


def last_gaze(model: Module, inputs: Inputs) -> Tensor:
    """What the last token of each text gives to each key, on the mean over heads: (layers, batch, tokens)."""
    prompt = read_prompt(model, inputs)
    with torch.no_grad(), watch(model, Rows([prompt.ids.shape[1] - 1]), layers=decoder_layers(model)) as seen:
        model(**inputs)
    rows = torch.from_numpy(seen.dataset().rows.values)[..., 0, :]
    return rows.mean(dim=2).to(prompt.ids.device)
