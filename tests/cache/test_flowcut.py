"""FlowCut drops the image tokens through which little flows in the vision encoder, and no others."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard.cache import FlowCut, KeepAll
from tests.cache.images import SEERS, deep, generate, pair, reader
from tests.steer.vision.conftest import IMAGE, SMALL, TEXT, Seer, widened

Call = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of one image, (heads, N, D)


def survivors(calls: list[Call], target: int, last: int, class_token: bool = False, merged: int = 1) -> list[int]:
    """The image tokens that are left of one image, written out one by one; the layer ``last`` cuts to the target."""
    first = int(class_token)
    left = list(range((calls[0][0].shape[1] - first) // merged))
    total: dict[int, float] = {}
    for layer, (query, key, value) in enumerate(calls[: last + 1]):
        patches = [first + token * merged + part for token in left for part in range(merged)]
        among = [0] * first + patches
        asks = query[:, 0] if class_token else query[:, among].mean(1)
        carries = value[:, 0] if class_token else value[:, among].mean(1)
        shares = []
        for one, others, scale in ((asks, key, query.shape[-1] ** -0.5), (carries, value, 1.0)):
            by_head = [torch.softmax(others[h, among] @ one[h] * scale, 0) for h in range(len(one))]
            mean = (sum(by_head) / len(by_head))[first:]
            shares.append(mean / mean.sum())
        importance = (shares[0] + shares[1]) * torch.stack([value[:, patch].mean(0).abs().sum() for patch in patches])
        for number, token in enumerate(left):
            now = float(importance[number * merged : (number + 1) * merged].mean())
            total[token] = now if layer == 0 else (total[token] + now) / 2
        if (last - layer) % 2 == 0 and len(left) > target:
            given_to = [float(shares[0][n * merged : (n + 1) * merged].sum()) for n in range(len(left))]
            ratio = sum(-p * math.log(p) for p in given_to if p > 0) / math.log(len(left))
            gone = len(left) - target
            if layer < last:
                gone = min(round(gone / math.sqrt(last - layer) * (1 - ratio**2)), gone)
            left = sorted(sorted(left, key=lambda token: -total[token])[: len(left) - gone])
    return left


class Attend(torch.nn.Module):
    def __init__(self, *call: Tensor) -> None:
        super().__init__()
        self.call = call

    def forward(self) -> Tensor:
        return scaled_dot_product_attention(*self.call)


class Encoder(torch.nn.Module):
    """Attention calls that are given, one of each layer, (images, heads, N, D)."""

    spatial_merge_size: int

    def __init__(self, calls: list[Call], class_token: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Attend(*call) for call in calls)
        if class_token:
            self.class_embedding = torch.nn.Parameter(torch.zeros(1))

    def forward(self) -> None:
        for layer in self.layers:
            layer()


class Whole(torch.nn.Module):
    def __init__(self, visual: Encoder, **config: Any) -> None:
        super().__init__()
        self.visual = visual
        self.config = SimpleNamespace(**config)


def left_of(policy: FlowCut, encoder: Encoder, **config: Any) -> list[list[int]]:
    """Of each image, the tokens that are left after a run of the encoder."""
    whole = Whole(encoder, image_token_id=IMAGE, **config)
    images, _, tokens, _ = encoder.layers[0].call[0].shape
    tokens = (tokens - hasattr(encoder, "class_embedding")) // getattr(encoder, "spatial_merge_size", 1) ** 2
    with policy.beside(whole) as beside:
        whole.visual()
        stay = beside.stay(torch.ones(images, tokens, dtype=torch.bool))
    return [row.nonzero()[:, 0].tolist() for row in stay]


def layer(looks: list[float], sizes: list[float]) -> Call:
    """One head; the class token has these logits for four patches, whose values are of these sizes; its own is 0."""
    query = torch.zeros(1, 1, 5, 4, dtype=torch.float64)
    query[..., 0, 0] = 2  # 1 / √D is 1/2
    key, value = torch.zeros_like(query), torch.zeros_like(query)
    key[0, 0, :, 0] = torch.tensor([0.0, *looks])
    value[0, 0, :, 1] = torch.tensor([0.0, *sizes])
    return query, key, value


EVENLY = [0.0] * 4


def test_even_attention_cuts_nothing_before_the_end() -> None:
    """C of the three layers that count is (S₀ + S₁ + 2 S₂) / 4, S half the value's size; the last layer does not count."""
    calls = [layer(EVENLY, [4, 0, 2, 3]), layer(EVENLY, [0, 5, 1, 0]), layer(EVENLY, [1, 1, 0, 2])]
    encoder = Encoder([*calls, layer(EVENLY, [0, 0, 99, 0])], class_token=True)  # C ∝ 6, 7, 3, 7
    assert left_of(FlowCut(budget=3), encoder) == [[0, 1, 3]]
    assert left_of(FlowCut(budget=0.5), encoder) == [[1, 3]]
    assert left_of(FlowCut(budget=9), encoder) == [[0, 1, 2, 3]]


def test_narrow_attention_cuts_early_and_what_is_cut_counts_no_more() -> None:
    """All attention on one patch: (4 − 1) / √2, 2 go at once. Later, neither attention nor size brings them back."""
    narrow = layer([60, 0, 0, 0], [3, 1, 2, 4])  # S = 15/4, 1/4, 2/4, 4/4: 1 and 2 go
    later = layer([0, 60, 1, 2], [1, 99, 99, 1.5])  # softmax(0, 2) = 0.12, 0.88 for 0 and 3: S = 0.62, 2.07
    encoder = Encoder([narrow, later, later, later], class_token=True)
    assert left_of(FlowCut(budget=1), encoder) == [[3]]  # C = 1.40, 1.80
    assert left_of(FlowCut(budget=2), encoder) == [[2, 3]]  # 2 / √2: only 1 went, and 2 grew
    even = Encoder([layer(EVENLY, [3, 1, 2, 4]), later, later, later], class_token=True)
    assert left_of(FlowCut(budget=1), even) == [[1]]  # which had not gone yet


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(2, 8), st.integers(1, 12), st.booleans(), st.sampled_from([1, 4]),
    st.integers(0, 99),
)  # fmt: skip
def test_the_rule(layers: int, images: int, tokens: int, target: int, named: bool, merged: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (images, 2, tokens * merged + named, 4)
    calls = [tuple(torch.randn(3, *shape, generator=generator, dtype=torch.float64) * 2) for _ in range(layers)]
    encoder = Encoder(calls, named)
    encoder.spatial_merge_size = math.isqrt(merged)
    last = max(layers - 1 - named, 0)
    for image, found in enumerate(left_of(FlowCut(budget=target), encoder)):
        own = [(query[image], key[image], value[image]) for query, key, value in calls]
        assert found == survivors(own, min(target, tokens), last, named, merged)
        assert len(found) == min(target, tokens)


@pytest.mark.parametrize(("feature", "used"), [(-1, 5), (-2, 4), (3, 3), ([1, -3], 3), (1, 1)])
def test_layers_that_the_features_do_not_come_out_of_do_not_count(feature: int | list[int], used: int) -> None:
    generator = torch.Generator().manual_seed(1)
    calls = [tuple(torch.randn(3, 1, 2, 9, 4, generator=generator, dtype=torch.float64)) for _ in range(5)]
    found = left_of(FlowCut(budget=3), Encoder(calls, True), vision_feature_layer=feature)
    assert found == [survivors([tuple(t[0] for t in call) for call in calls], 3, max(used - 2, 0), True)]


def encoder_calls(seer: Seer, inputs: dict[str, Tensor]) -> list[list[Call]]:
    """Of each image, the calls of the encoder's layers."""
    found: dict[str, list[Call]] = {}

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        if "vis" in call.place.path:
            chunk = call.place.path.partition("#")[2]
            for image, one in enumerate(zip(call.query, call.key, call.value, strict=True)):
                found.setdefault(f"{chunk or 0}.{image}", []).append(one)
        return call

    with torch.no_grad(), regard.steer(seer.model, regard.Custom(note)):
        seer.model(**inputs)
    return list(found.values())


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("budget", [0.25, 6])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SEERS)
def test_all_layers_keep_text_and_what_the_encoder_left(name: str, batch: int, budget: float) -> None:
    seer = deep(SEERS[name]())
    seer.model.double()
    inputs = doubled(seer.inputs if batch == 1 else pair(seer))
    with torch.no_grad(), regard.compress(seer.model, FlowCut(budget=budget)) as cache:
        seer.model(**inputs)
    target = budget if isinstance(budget, int) else 4
    stay = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    calls = encoder_calls(seer, inputs)
    assert len(calls) == batch
    for row, own in enumerate(calls):
        tokens = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        named = name == "llava"
        left = survivors(own, target, len(own) - 1 - named, named, 1 if named else 4)
        stay[row, tokens[left]] = True
    assert stay.sum(1).tolist() == [6 + target, 4 + target][:batch]
    for found in cache.report().layers:
        assert torch.equal(found.positions, stay[:, None].expand_as(found.positions))
        assert found.kept == [6 + target] * 2


def test_images_of_different_sizes_in_one_text() -> None:
    """Qwen2-VL's encoder is called for each; the share is of each image."""
    seer = deep(SEERS["qwen2-vl"]())
    seer.model.double()
    ids = torch.cat([seer.inputs["input_ids"], torch.tensor([[5, 6, *[IMAGE] * 6, 7]])], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(64 + 24, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 6]]),
    }
    with torch.no_grad(), regard.compress(seer.model, FlowCut(budget=0.5)) as cache:
        seer.model(**inputs)
    large, small = encoder_calls(seer, inputs)
    stay = ids != IMAGE
    stay[0, torch.tensor(survivors(large, 8, 6, False, 4)) + 2] = True
    stay[0, torch.tensor(survivors(small, 3, 6, False, 4)) + 24] = True
    for found in cache.report().layers:
        assert torch.equal(found.positions, stay[:, None].expand_as(found.positions))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SEERS)
def test_the_whole_budget_changes_nothing(name: str, batch: int, options: dict[str, Any]) -> None:
    seer = SEERS[name]()
    inputs = seer.inputs if batch == 1 else pair(seer)
    plain = generate(seer, inputs, **options)
    for policy in (FlowCut(), FlowCut(budget=99), KeepAll()):
        with regard.compress(seer.model, policy):
            assert torch.equal(generate(seer, inputs, **options), plain)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", SEERS)
def test_a_text_in_a_batch_goes_on_as_alone(name: str, beams: int) -> None:
    seer = deep(SEERS[name]())
    with regard.compress(seer.model, FlowCut(budget=5)):
        together = generate(seer, pair(seer), num_beams=beams)
        single = generate(seer, seer.inputs, num_beams=beams)
    assert torch.equal(together[:1], single)


def test_watching_sees_the_encoder_too() -> None:
    seer = SEERS["llava"]()
    with regard.compress(seer.model, FlowCut(budget=5)) as cache, regard.watch(seer.model, regard.Entropy()) as seen:
        generate(seer, seer.inputs)
    assert len(seen.layers) == 2 + 4
    assert cache.report().layers[0].positions[0, 0, :22].sum() == 6 + 5


def test_further_turns() -> None:
    """A turn without an image drops nothing; a second image is cut by itself; what is left of the first stays."""
    seer, past = SEERS["llava"](), hf.DynamicCache()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), regard.compress(seer.model, FlowCut(budget=5)) as cache:
        seer.model(seer.inputs["input_ids"], pixel_values=seer.inputs["pixel_values"], past_key_values=past)
        first = cache.report().layers[3].positions[0, 0]
        seer.model(torch.tensor([[9, 10, 11]]), past_key_values=past)
        assert cache.report().layers[3].kept == [11 + 3] * 2
        seer.model(torch.tensor([[13, *[IMAGE] * 16, 14]]), pixel_values=pixels, past_key_values=past)
    for found in cache.report().layers:
        assert found.kept == [11 + 3 + 2 + 5] * 2
        assert torch.equal(found.positions[0, 1, :22], first)


def refused(model: torch.nn.Module, inputs: dict[str, Tensor], message: str, **arguments: Any) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message), \
            regard.compress(model, FlowCut(budget=4, **arguments)):  # fmt: skip
        model(**inputs)


def test_images_that_were_not_seen() -> None:
    seer = SEERS["llava"]()
    blind = {name: value for name, value in seer.inputs.items() if name != "pixel_values"}
    refused(seer.model, blind, r"\(model.vision_tower\), and saw none of the 16 image tokens of this prompt: give")
    refused(seer.model, seer.inputs, r"read 1 × \(1, 16\) of them last, and the batch has 3 image", image=[2, 3, 4])
    without = seer.inputs | {"input_ids": seer.inputs["input_ids"].clamp(max=50)}
    refused(seer.model, {"input_ids": without["input_ids"]}, r"text 0 of the batch has none among its 22 tokens")
    seer.model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad(), regard.compress(seer.model, FlowCut(budget=4)) as cache:  # eager attention is seen too
        seer.model(**seer.inputs)
    assert cache.report().layers[0].positions[0, 0].sum() == 22 - 16 + 4


def test_models_whose_image_tokens_are_not_their_patches() -> None:
    refused(
        reader(), {}, r"vision encoder, and LlamaForCausalLM has none that is named vision_tower, .*ImageRank works"
    )
    tiles = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4), text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )  # fmt: skip
    refused(hf.LlavaNextForConditionalGeneration(tiles), {}, r"LlavaNext.* are: it cuts images into tiles")


def test_windows_in_the_encoder() -> None:
    """Qwen2.5-VL's attend in windows in most layers, in an order of their own."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32,
              "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    named = {"image_token_id": IMAGE, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
    text = TEXT | {"rope_parameters": rope}
    model = widened(
        hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **named))
    )
    inputs = SEERS["qwen2-vl"]().inputs
    refused(model, inputs, r"not attend to the same ones in each: blocks\.1\.attn has a call of 1 × 64 patches")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1.5"):
        FlowCut(budget=1.5)
