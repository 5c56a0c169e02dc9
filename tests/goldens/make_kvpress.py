"""Write what the presses of kvpress keep of a text: ``python -m tests.goldens.make_kvpress FOLDER``.

FOLDER is where ``pip install --no-deps --target FOLDER kvpress`` put it. The model is the one inside the package, so that the
same attention is found again without kvpress. The file says with which versions it was made.
"""

import importlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers as hf
from torch import Tensor, nn

import regard

FILE = Path(__file__).with_name("kvpress.json")
PROMPT, STEPS = 128, 9
CHUNK = 50  # tokens of the prompt that KVzip repeats at once
MARGIN = 3e-5  # of each score: what is kept has to be the same if they differ by so much
STREAMING = {0: [0, 1, 3], 1: [2], 3: [0, 1, 2, 3]}  # key heads, by layer
FILTERS = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))
Press = Any


def presses() -> dict[str, Callable[[], Press]]:
    """Presses by the name under which the file has them."""

    def of(module: str, name: str, *args: Any, **kwargs: Any) -> Press:
        return getattr(importlib.import_module(f"kvpress.presses.{module}_press"), name)(*args, **kwargs)

    def snapkv(dropped: float, window: int, kernel: int) -> Press:
        return of("snapkv", "SnapKVPress", dropped, window_size=window, kernel_size=kernel)

    def pyramid(dropped: float) -> Press:
        return of("pyramidkv", "PyramidKVPress", dropped, window_size=2, kernel_size=5)

    def duo() -> Press:
        press = of("duo_attention", "DuoAttentionPress", head_compression_ratio=0.5)
        press.sink_size, press.recent_size = 3, 17
        press.streaming_mask = torch.zeros(4, 4, dtype=torch.bool)
        for layer, heads in STREAMING.items():
            press.streaming_mask[layer, heads] = True
        press.post_init_from_model = lambda model: None  # it would fetch a pattern of heads
        return press

    def filters() -> Press:
        press = of("qfilter", "QFilterPress", 0.75)
        press.q_filters = FILTERS
        press.post_init_from_model = lambda model: None  # it would fetch filters
        return press

    def expected(**settings: Any) -> Press:
        return of("expected_attention", "ExpectedAttentionPress", 0.75, **settings)

    def kvzip(**settings: Any) -> Press:
        return of("kvzip", "KVzipPress", 0.75, chunk_size=CHUNK, **settings)

    def critical(press: Press) -> Press:
        return of("criticalkv", "CriticalKVPress", press)

    def decoding(press: Press) -> Press:
        return of("decoding", "DecodingPress", press, compression_interval=4, target_size=60)

    return {
        "Knorm": lambda: of("knorm", "KnormPress", 0.75),
        "SnapKV, window 16, kernel 5": lambda: snapkv(0.75, 16, 5),
        "SnapKV, window 8, kernel 7": lambda: snapkv(0.5, 8, 7),
        "TOVA": lambda: of("tova", "TOVAPress", 0.75),
        "StreamingLLM": lambda: of("streaming_llm", "StreamingLLMPress", 0.75, n_sink=4),
        "ObservedAttention": lambda: of("observed_attention", "ObservedAttentionPress", 0.5),
        "PyramidKV": lambda: pyramid(1 - 60 / PROMPT),
        "AdaKV of Knorm": lambda: of("adakv", "AdaKVPress", of("knorm", "KnormPress", 1 - 40 / PROMPT)),
        "AdaKV of SnapKV": lambda: of("adakv", "AdaKVPress", snapkv(1 - 40 / PROMPT, 8, 5)),
        "DuoAttention": duo,
        "ExpectedAttention": expected,
        "ExpectedAttention, mean alone": lambda: expected(use_covariance=False, use_vnorm=False, n_sink=2),
        "Q-Filters": filters,
        "KVzip": kvzip,
        "KVzip, by layer": lambda: kvzip(layerwise=True),
        "KVzip+": lambda: kvzip(kvzip_plus_normalization=True, n_sink=2),
        "ThinK": lambda: of("think", "ThinKPress", 0.5, window_size=16),
        "ThinK, most channels": lambda: of("think", "ThinKPress", 0.25, window_size=32),
        "KeyDiff": lambda: of("keydiff", "KeyDiffPress", 0.75),
        "ChunkKV of Knorm": lambda: of("chunkkv", "ChunkKVPress", of("knorm", "KnormPress", 0.5), chunk_length=20),
        "CriticalKV of SnapKV": lambda: critical(snapkv(0.75, 16, 5)),
        "CriticalKV of ExpectedAttention": lambda: critical(expected(use_vnorm=False)),
        "CriticalAdaKV of SnapKV": lambda: of("criticalkv", "CriticalAdaKVPress", snapkv(1 - 40 / PROMPT, 8, 5)),
        "Knorm while decoding": lambda: decoding(of("knorm", "KnormPress")),
        "TOVA while decoding": lambda: decoding(of("tova", "TOVAPress")),
    }


def kept_by(model: Any, press: Press, ids: Tensor) -> list[list[list[int]]]:
    """The positions that are left, by layer and key head, of a prompt, and of steps after it if the press decodes."""
    model.set_attn_implementation("eager" if "Observed" in type(press).__name__ else "sdpa")
    if "KVzip" in type(press).__name__:
        return kept_after_repeating(model, press, ids[:, :PROMPT])
    places: dict[int, Tensor] = {}  # (key heads, entries), by layer
    token = 0  # the first of a call

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache, layer = kwargs["past_key_values"], module.layer_idx
        before, heads = cache.layers[layer].keys[0], cache.layers[layer].keys.shape[1]
        new = torch.arange(token, token + kwargs["hidden_states"].shape[1]).expand(heads, -1)
        places[layer] = torch.cat([places[layer], new], dim=1) if layer in places else new
        module.masked_key_indices = None
        output = press.forward_hook(module, args, kwargs | {"cache_position": new[0]}, output)
        after = cache.layers[layer].keys[0]
        if "ThinK" in type(press).__name__:
            return output
        same = (before[:, None] == after[:, :, None]).all(dim=-1)  # (heads, kept, entries)
        assert same.sum(dim=-1).eq(1).all(), "two entries have one key"
        places[layer] = places[layer].gather(1, same.long().argmax(dim=-1))  # in the order of the cache
        return output

    press.post_init_from_model(model)
    attention = [layer.self_attn for layer in model.model.layers]
    for module in attention:
        object.__setattr__(module, "rotary_emb", model.model.rotary_emb)  # where presses look for it
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in attention]
    tokens = ids.shape[1] if "Decoding" in type(press).__name__ else PROMPT
    with torch.no_grad():
        past = hf.DynamicCache(config=model.config)
        for end in (PROMPT, *range(PROMPT + 1, tokens + 1)):
            model(ids[:, token:end], past_key_values=past, position_ids=torch.arange(token, end)[None])
            token = end
    for handle in handles:
        handle.remove()
    if "ThinK" in type(press).__name__:  # it makes channels zero: those that are not, instead of positions
        return [[head.any(dim=0).nonzero()[:, 0].tolist() for head in layer.keys[0]] for layer in past.layers]
    return [left_of(module, places[module.layer_idx]) for module in attention]


def kept_after_repeating(model: Any, press: Press, ids: Tensor) -> list[list[list[int]]]:
    """The positions that are left, by layer and key head, by a press that has the model read the prompt again."""
    with torch.no_grad(), press(model):
        model(ids, past_key_values=hf.DynamicCache(config=model.config))
    attention = [layer.self_attn for layer in model.model.layers]
    every = torch.arange(ids.shape[1]).expand(model.config.num_key_value_heads, -1)
    left = [left_of(module, every) for module in attention]
    for module in attention:
        module.masked_key_indices = None
    return left


def left_of(module: nn.Module, places: Tensor) -> list[list[int]]:
    """Positions by head, less those that the press has masked instead of dropping them."""
    left = torch.ones_like(places, dtype=torch.bool)
    if getattr(module, "masked_key_indices", None) is not None:
        _, heads, entries = module.masked_key_indices
        left[heads, entries] = False
    return [sorted(row[kept].tolist()) for row, kept in zip(places, left, strict=True)]


def shake(press: Press, seed: int) -> None:
    """Change the press's scores a little, as another order of the same sums would, only more."""
    scorer = next((getattr(press, name) for name in ("base_press", "press") if hasattr(press, name)), press)
    generator = torch.Generator().manual_seed(seed)

    def shaken(scores: Tensor) -> Tensor:
        return scores * (1 + MARGIN * (2 * torch.rand(scores.shape, generator=generator) - 1))

    if hasattr(scorer, "score"):
        score = scorer.score
        scorer.score = lambda *args: shaken(score(*args))
    if hasattr(scorer, "compute_window_queries"):
        queries = scorer.compute_window_queries
        scorer.compute_window_queries = lambda *args: shaken(queries(*args))
    if hasattr(scorer, "compress_post"):
        compress_post = scorer.compress_post

        def shaken_post(model: Any) -> None:
            scorer.score_val = shaken(scorer.score_val)
            compress_post(model)

        scorer.compress_post = shaken_post


def stand_in(folder: str) -> None:
    """Find kvpress without what it imports beside torch and transformers, and without what importing it changes."""
    package = ModuleType("kvpress")
    package.__path__ = [str(Path(folder) / "kvpress")]
    sys.modules["kvpress"] = package
    for name in ("cachetools", "datasets", "requests"):
        sys.modules.setdefault(name, MagicMock())


def kept_by_all(model: Any, ids: Tensor) -> dict[str, list[list[list[int]]]] | None:
    """What each press keeps; None if the scores of some are too close to tell."""
    kept = {}
    for name, make in presses().items():
        kept[name] = kept_by(model, make(), ids)
        for seed in range(5):
            press = make()
            shake(press, seed)
            if kept_by(model, press, ids) != kept[name]:
                return None
    return kept


def main() -> None:
    """Find ids of which every press is sure, and write them with what it keeps."""
    folder = sys.argv[1]
    stand_in(folder)
    (version,) = (found.version for found in distributions(path=[folder]) if found.name == "kvpress")
    model, _ = regard.mini()
    kept, seed = None, 0
    while kept is None:  # ids of which none is twice there, as equal keys have equal norms
        ids = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[None, : PROMPT + STEPS] + 40
        kept, seed = kept_by_all(model, ids), seed + 1
    lines = [f"  {json.dumps(name)}: {json.dumps(layers, separators=(',', ':'))}" for name, layers in kept.items()]
    made = {"kvpress": version, "transformers": hf.__version__, "torch": torch.__version__}
    parts = [f'{{"made_with": {json.dumps(made)},', f'"ids": {ids[0].tolist()},', '"kept": {', ",\n".join(lines), "}}"]
    FILE.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
