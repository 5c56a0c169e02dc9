"""OPERA: a penalty on tokens that lean on a few summary tokens, and a way back from where that began.

With ω_ij the attention of the last layer, the largest of the heads', each row divided by its sum, a column j of the
response's own triangle has the score

    φ_j = 10⁻⁷ · Π_{i=j}^{t} σ ω_ij,   σ = 50,   φ = max_j φ_j

where row t is that of a candidate for the next token. Of the k = 5 likeliest, the logits lose ``weight · φ``; for the first
10 tokens they gain the candidate's attention to the image instead. If the best column has been the same one s more than
r = 15 times, decoding goes back to s and chooses another token after it than it did, at most k times; then at s itself.

Q. Huang, X. Dong, P. Zhang, B. Wang, C. He, J. Wang, D. Lin, W. Zhang, N. Yu (2024), OPERA: Alleviating Hallucination in
Multi-Modal Large Language Models via Over-Trust Penalty and Retrospection-Allocation; the factor 10⁻⁷ and the first 10 tokens
are of their code.

Rows are read with `regard.Rows`, one for each candidate: all candidates of all beams go through the model as one batch, one
token a step, with a cache of their own, and the products are carried on as sums of logarithms. Left out: rollback of several
beams at once, as ``generate`` cannot be taken back; the penalty works in beam search, the rollback with one beam. The whole
response is the window, as in their code; after a rollback the candidates keep their penalty, which there is dropped for that
one step. Padding before a prompt is right for models whose positions are relative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.tokens import Positions, resolve
from regard.watch import Rows, watch

_AT_ONCE = 32  # rows of the response read in one pass, where it has to be read again
_LARGEST = 1e4  # a penalty as good as infinite


class OverTrustPenalty:
    """A logits processor for ``generate``: ``logits_processor=[OverTrustPenalty(model, inputs)]``.

    It runs the model inside ``generate``, once a step; blocks of `regard.steer` around it hold in those passes too.

    Args:
        model: a transformers model that keeps no state between passes but its cache.
        inputs: as for ``generate``: ``input_ids`` (batch, tokens), and what else the model needs to read the prompt.
        image: positions in the prompt of what the first tokens of the response should look at; nothing by default.
        candidates: k.
        scale: σ.
        weight: of the penalty.
        unit: the factor of the products.
        threshold: r.
        warmup: the number of tokens for which the image counts instead; a rollback does not go to before it.

    Raises:
        ValueError: inputs without ``input_ids``, fewer than two candidates.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20, eos_token_id=None)).eval()
    >>> inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    >>> penalty = OverTrustPenalty(model, inputs, image=[1], warmup=2)
    >>> model.generate(**inputs, max_new_tokens=4, do_sample=False, logits_processor=[penalty]).shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        image: Positions | None = None,
        candidates: int = 5,
        scale: float = 50.0,
        weight: float = 1.0,
        unit: float = 1e-7,
        threshold: int = 15,
        warmup: int = 10,
    ) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            got = (
                f"shape {tuple(ids.shape)}"
                if isinstance(ids, Tensor)
                else f"inputs {', '.join(inputs) or 'of nothing'}"
            )
            raise ValueError(f"OverTrustPenalty needs input_ids of shape (batch, tokens), got {got}")
        if candidates < 2:
            raise ValueError(f"OverTrustPenalty chooses among candidates, at least 2; got {candidates}")
        self.inputs = dict(inputs)
        self.prompt = ids.shape[1]
        self.candidates = candidates
        self.rollback: int | None = None
        """Where in the response another token should be chosen, after a step that showed so."""
        self._model = model
        self._scale, self._weight, self._unit = scale, weight, unit
        self._threshold, self._warmup = threshold, warmup
        self._image = None if image is None else resolve(image, 0, self.prompt)[0]
        self._layer = ""
        self._cache: Any = None
        self._ids: Tensor | None = None  # of every branch, (rows · k, tokens): a candidate after each row
        self._logs = torch.zeros(0)  # Σ_i log(σ ω_ij) of every branch, (rows · k, tokens of the response)
        self._places = torch.zeros(0, 0, dtype=torch.long)  # the best column at each step, (rows, steps)
        self._rejected: dict[int, set[int]] = {}
        self._times: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the candidates, less their penalty; the others' are −inf."""
        response = input_ids.shape[1] - self.prompt
        logs = self._follow(input_ids)
        open_to = scores.clone()
        open_to[:, list(self._rejected.get(response, ()))] = -torch.inf
        best = open_to.topk(self.candidates, dim=-1)
        tokens = best.indices.reshape(-1, 1)
        row = self._read(tokens, [input_ids.shape[1]])[:, 0]
        self._ids = torch.cat([input_ids.repeat_interleave(self.candidates, dim=0), tokens], dim=1)
        self._logs = self._carry(logs, row[:, None, self.prompt :])
        products, columns = self._logs.max(dim=-1)
        self._note(columns.view(-1, self.candidates))
        over_trust = (self._unit * products.exp()).clamp(max=_LARGEST)
        penalty = -self._on_image(row) if response < self._warmup else over_trust
        lessened = best.values - self._weight * penalty.view_as(best.values).to(best.values)
        chosen = torch.log_softmax(lessened, dim=-1)
        return torch.full_like(scores, -torch.inf).scatter(1, best.indices, chosen)

    def roll_back(self, token_ids: Tensor) -> Tensor:
        """The text (1, tokens) as far as it holds; the token that came next will not be chosen there again."""
        if self.rollback is None or token_ids.shape[0] != 1:
            raise ValueError(f"there is nothing to roll back in {token_ids.shape[0]} texts")
        place, self.rollback = self.rollback, None
        self._times[place] = self._times.get(place, 0) + 1
        self._rejected = {at: tokens for at, tokens in self._rejected.items() if at <= place}
        self._rejected.setdefault(place, set()).add(int(token_ids[0, self.prompt + place]))
        self._places = self._places[:, :place]
        return token_ids[:, : self.prompt + place]

    def _follow(self, input_ids: Tensor) -> Tensor:
        """Bring the cache to these texts, one branch for each candidate to come; their columns, (rows · k, response)."""
        index = None if self._ids is None else _rows_of(input_ids, self._ids)
        if index is None:
            return self._start(input_ids)
        branches = index.repeat_interleave(self.candidates)
        self._cache.reorder_cache(branches)
        self._places = self._places[index // self.candidates]
        return self._logs[branches]

    def _start(self, input_ids: Tensor) -> Tensor:
        """Read the prompt, then what there is of a response."""
        rows, texts = input_ids.shape[0], self.inputs["input_ids"].shape[0]
        with torch.no_grad(), watch(self._model, Rows([0])) as seen:
            self._cache = self._model(**self.inputs, use_cache=True).past_key_values
        self._layer = seen.layers[-1]
        self._cache.batch_repeat_interleave(self.candidates * (rows // texts))
        branches = input_ids.repeat_interleave(self.candidates, dim=0)
        logs = torch.zeros(len(branches), 0, dtype=torch.float64)
        for start in range(self.prompt, input_ids.shape[1], _AT_ONCE):
            part = branches[:, start : start + _AT_ONCE]
            read = self._read(part, list(range(start, start + part.shape[1])))
            logs = self._carry(logs, read[:, :, self.prompt :])
        response = input_ids.shape[1] - self.prompt
        if self._places.shape[0] != rows or (response == 0 and 0 not in self._rejected):  # another text begins
            self._places = torch.zeros(rows, 0, dtype=torch.long)
            self._rejected, self._times = {}, {}
        return logs

    def _read(self, tokens: Tensor, positions: list[int]) -> Tensor:
        """Go on with these tokens: what they look at in the last layer, (branches, tokens, keys), rows of sum 1."""
        more: dict[str, Tensor] = {}
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, Tensor):
            grown = torch.nn.functional.pad(mask, (0, positions[-1] + 1 - mask.shape[1]), value=1)
            more["attention_mask"] = grown.repeat_interleave(len(tokens) // len(mask), dim=0)
        with torch.no_grad(), watch(self._model, Rows(positions), layers=self._layer) as seen:
            self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **more)
        largest = torch.as_tensor(seen.dataset().rows.isel(layer=0).values).double().amax(dim=1)
        return largest / largest.sum(dim=-1, keepdim=True)

    def _carry(self, logs: Tensor, rows: Tensor) -> Tensor:
        """The columns' sums with more rows (branches, new, columns); each new row begins a column of its own."""
        logs = torch.nn.functional.pad(logs, (0, rows.shape[1]))
        return logs + (self._scale * rows).log().tril(logs.shape[1] - rows.shape[1]).sum(dim=1)

    def _on_image(self, row: Tensor) -> Tensor:
        if self._image is None:
            return row.new_zeros(row.shape[0])
        return row[:, : self.prompt][:, self._image.to(row.device)].sum(dim=-1)

    def _note(self, columns: Tensor) -> None:
        """Keep which column was the best at this step, and see whether it has been so too often."""
        here = columns.mode(dim=-1).values
        self._places = torch.cat([self._places, here[:, None]], dim=1)
        place = int(here.mode().values)
        often = (self._places == place).sum(dim=1) > self._threshold
        self.rollback = None
        if place >= self._warmup and bool(often.all()):
            tried = (at for at in (place + 1, place) if self._times.get(at, 0) < self.candidates)
            self.rollback = next(tried, None)


def generate_with_rollback(model: Any, penalty: OverTrustPenalty, max_new_tokens: int, **options: Any) -> Tensor:
    """``model.generate`` with the penalty, taken back whenever one column was the best too often: ids (1, tokens).

    Args:
        model: that of the penalty.
        penalty: with the inputs of one text.
        max_new_tokens: of the response.
        options: for ``generate``.

    Raises:
        ValueError: several texts or beams.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20, eos_token_id=None)).eval()
    >>> penalty = OverTrustPenalty(model, {"input_ids": torch.tensor([[3, 4, 5]])}, threshold=3, warmup=2)
    >>> generate_with_rollback(model, penalty, max_new_tokens=8, do_sample=False).shape
    torch.Size([1, 11])
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    ids: Tensor = penalty.inputs["input_ids"]
    if ids.shape[0] != 1 or options.get("num_beams", 1) != 1:
        raise ValueError(
            f"generate_with_rollback goes back in one text with one beam, got {ids.shape[0]} texts and "
            f"num_beams={options.get('num_beams', 1)}; in beam search the penalty works without, as a logits processor"
        )

    def stop(input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        return torch.full((len(input_ids),), penalty.rollback is not None, device=input_ids.device)

    end = penalty.prompt + max_new_tokens
    while True:
        inputs = penalty.inputs | {"input_ids": ids}
        if isinstance(inputs.get("attention_mask"), Tensor):
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        ids = model.generate(
            **inputs,
            **options,
            max_new_tokens=end - ids.shape[1],
            logits_processor=LogitsProcessorList([penalty]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        if penalty.rollback is None:
            return ids
        ids = penalty.roll_back(ids)


def _rows_of(texts: Tensor, branches: Tensor) -> Tensor | None:
    """For each text the branch that is it; None if one has none."""
    if texts.shape[1] != branches.shape[1]:
        return None
    same = (texts[:, None] == branches[None]).all(dim=-1)
    return same.int().argmax(dim=1).cpu() if bool(same.any(dim=1).all()) else None
