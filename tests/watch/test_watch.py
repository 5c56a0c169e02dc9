"""The block itself: where calls are found, what is restored, and what is refused."""

import functools
import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import regard
from tests.watch.test_models import GROUPED, SMALL, TEXT, built, ids, stored


class HandWritten(nn.Module):
    """Attention as people write it, with the function that they imported their own way."""

    def __init__(self, function: Any = F.scaled_dot_product_attention, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.function = function
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.project(x).view(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.function(query, key, value, **self.options).transpose(1, 2).reshape(batch, tokens, 32)


def matrix_of(module: HandWritten, x: Tensor, causal: bool = False) -> np.ndarray:
    query, key, _ = module.project(x).detach().view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).double()
    logits = query @ key.transpose(-1, -2) * 8**-0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1).numpy()


@pytest.mark.parametrize(
    "function",
    [
        scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        functools.partial(F.scaled_dot_product_attention, is_causal=False),
    ],
    ids=["from import", "full name", "C function", "partial"],
)
def test_any_import_style(function: Any) -> None:
    module, x = HandWritten(function), torch.randn(2, 6, 32)
    with torch.no_grad(), regard.watch(module, regard.Received()) as seen:
        module(x)
    assert seen.layers == ["HandWritten"]
    np.testing.assert_allclose(seen.dataset().received[0], matrix_of(module, x).sum(2), atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_transformer_encoder(batch_first: bool, grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, -1] = True
    x = x if batch_first else x.transpose(0, 1)
    with torch.set_grad_enabled(grad):
        plain = encoder(x, src_key_padding_mask=padding)
        with regard.watch(encoder, regard.Received(), token_mask=~padding, keep_maps=True) as seen:
            watched = encoder(x, src_key_padding_mask=padding)
    assert seen.layers == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(plain, watched)
    real = ~padding[:, None, :, None]
    weights = seen.maps["layers.0.self_attn"][0].dense()
    expected = encoder.layers[0].self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    torch.testing.assert_close(weights * real, expected * real)
    np.testing.assert_allclose(seen.dataset().received[0], (expected * real).detach().sum(2), atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_multi_head_attention(need_weights: bool, average: bool, batched: bool) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True, kdim=20, vdim=24, add_bias_kv=True).eval()
    query, key, value = (torch.randn(2, n, d) for n, d in ((5, 32), (7, 20), (7, 24)))
    if not batched:
        query, key, value = query[0], key[0], value[0]
    options = {"need_weights": need_weights, "average_attn_weights": average}
    plain, plain_weights = attention(query, key, value, **options)
    with regard.watch(attention, regard.Entropy()) as seen:
        output, weights = attention(query, key, value, **options)
    torch.testing.assert_close(output, plain)
    assert (weights is None) == (plain_weights is None)
    if need_weights:
        torch.testing.assert_close(weights, plain_weights)
    assert seen.dataset().entropy.shape == (1, 2 if batched else 1, 4, 5)


def test_diffusers_attention() -> None:
    from diffusers.models.attention_processor import Attention

    attention = Attention(query_dim=32, cross_attention_dim=20, heads=4, dim_head=8).eval()
    x, text = torch.randn(2, 9, 32), torch.randn(2, 5, 20)
    with torch.no_grad(), regard.watch(attention, regard.Received()) as seen:
        attention(x, encoder_hidden_states=text)
    query = attention.head_to_batch_dim(attention.to_q(x))
    key = attention.head_to_batch_dim(attention.to_k(text))
    matrix = attention.get_attention_scores(query, key).detach().view(2, 4, 9, 5)
    np.testing.assert_allclose(seen.dataset().received[0], matrix.sum(2), atol=1e-5)


def test_no_model_watches_every_call_in_the_block() -> None:
    one, other, x = HandWritten(), nn.Sequential(HandWritten(is_causal=True)), torch.randn(1, 6, 32)
    q = torch.randn(1, 4, 6, 8)
    with torch.no_grad(), regard.watch(None, regard.Received()) as seen:
        one(x)
        other(x)
        F.scaled_dot_product_attention(q, q, q)
    assert seen.layers == ["HandWritten", "Sequential.0", "scaled_dot_product_attention"]
    np.testing.assert_allclose(seen.dataset().received[1], matrix_of(other[0], x, causal=True).sum(2), atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 3, 4, 6, 8)], ids=["2d", "3d", "5d"])
def test_inputs_of_other_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, *shape)
    mask = torch.rand(*shape[:-2], 6, 6) > 0.3
    mask[..., 0] = True
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with regard.watch(regard.Received(), share=False) as seen:
        watched = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(plain, watched)
    logits = (q.double() @ k.double().transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf)
    expected = logits.softmax(-1).sum(-2).reshape(seen.dataset().received[0].shape)
    np.testing.assert_allclose(seen.dataset().received[0], expected, atol=1e-5)


def test_mask_of_fewer_dimensions_than_the_call() -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 6, 8)
    mask = torch.rand(3, 4, 6, 6) > 0.3
    mask[..., 0] = True
    with regard.watch(regard.Received()) as seen:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q.double() @ k.double().transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf)
    np.testing.assert_allclose(seen.dataset().received[0], logits.softmax(-1).sum(-2).flatten(0, 1), atol=1e-5)


def test_causal_bias() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    with regard.watch(regard.Received(), keep_maps=True) as seen:
        F.scaled_dot_product_attention(q, k, k, attn_mask=causal_lower_right(3, 7))
    (matrix,) = seen.maps["scaled_dot_product_attention"]
    assert torch.equal(matrix.dense() > 0, torch.ones(1, 2, 3, 7).tril(4).bool())


def test_output_is_the_same_bit_for_bit_when_asked() -> None:
    model, tokens = built("llama"), ids()
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        with regard.watch(model, regard.Entropy(), regard.Received(), share=False):
            assert torch.equal(model(input_ids=tokens).logits, plain)
        model = model.bfloat16()
        plain = model(input_ids=tokens).logits
        with regard.watch(model, regard.Entropy(), regard.Received()):
            assert torch.equal(model(input_ids=tokens).logits, plain)


def test_gradients_are_those_of_the_plain_model() -> None:
    model, tokens = built("llama"), ids()
    model(input_ids=tokens).logits.square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with regard.watch(model, regard.Entropy(), regard.Received()) as seen:
        model(input_ids=tokens).logits.square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True) if p.grad is not None)
    assert len(seen.layers) == 2


def reference(model: nn.Module, name: str, tokens: Tensor) -> np.ndarray:
    matrices = [matrix.double().numpy() for matrix in stored(model, name, {"input_ids": tokens})[""]]
    return np.stack([matrix.sum(2) for matrix in matrices])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, tokens = built("llama"), ids()
    expected = reference(model, "llama", tokens)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with regard.watch(model, regard.Received()) as seen:
        model(input_ids=tokens, use_cache=False).logits.mean().backward()
    assert "pass" not in seen.dataset().dims
    np.testing.assert_allclose(seen.dataset().received, expected, atol=2e-5)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_plain_checkpointing_of_one_module() -> None:
    module, x = HandWritten(), torch.randn(1, 6, 32, requires_grad=True)
    with regard.watch(module, regard.Received()) as seen:
        checkpoint(module, x, use_reentrant=False).sum().backward()
    assert len(seen.layers) == 1
    np.testing.assert_allclose(seen.dataset().received[0], matrix_of(module, x.detach()).sum(2), atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_grad_modes(mode: type[AbstractContextManager[None]]) -> None:
    model, tokens = built("bert"), ids()
    expected = reference(model, "bert", tokens)
    with mode(), regard.watch(model, regard.Received()) as seen:
        model(input_ids=tokens)
    np.testing.assert_allclose(seen.dataset().received, expected, atol=2e-5)


def test_autocast_reads_what_the_model_computed() -> None:
    module, x = HandWritten(), torch.randn(1, 64, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = module(x)
        with regard.watch(module, regard.Entropy(), keep_maps=True) as seen:
            assert torch.equal(module(x), plain)
    (attention,) = seen.maps["HandWritten"]
    assert isinstance(attention, regard.AttentionMap)
    query, key = attention._scores.query, attention._scores.key
    assert query.dtype == torch.bfloat16
    exact = regard.AttentionMap(query.double(), key.double(), kernel="dense").entropy()
    np.testing.assert_allclose(seen.dataset().entropy[0], exact, rtol=1e-3)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_model_runs_uncompiled_inside_the_block(in_place: bool) -> None:
    module, x = HandWritten(), torch.randn(1, 6, 32)
    expected = matrix_of(module, x).sum(2)
    if in_place:
        module.compile(backend="eager")
    compiled = module if in_place else torch.compile(module, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        with regard.watch(compiled, regard.Received()) as seen:
            torch.testing.assert_close(compiled(x), plain)
        torch.testing.assert_close(compiled(x), plain)
    np.testing.assert_allclose(seen.dataset().received[0], expected, atol=1e-5)


def test_nested_blocks_see_the_same_calls() -> None:
    model, tokens = built("llama"), ids()
    outer, inner = regard.watch(model, regard.Received(), heads=[1]), regard.watch(model, regard.Received(), layers=[1])
    with torch.no_grad(), outer as one, inner as other:
        model(input_ids=tokens)
    assert one.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert other.layers == ["model.layers.1.self_attn"]
    np.testing.assert_array_equal(one.dataset().received[1].sel(head=1), other.dataset().received[0].sel(head=1))


def test_a_watch_is_reentrant() -> None:
    module, x = HandWritten(), torch.randn(1, 6, 32)
    watch = regard.watch(module, regard.Entropy())
    with torch.no_grad(), watch as first:
        module(x)
        with watch as second:
            module(x[:, :4])
    assert first.dataset().sizes["pass"] == 2
    assert second.dataset().sizes["query"] == 4
    with torch.no_grad(), watch as third:
        module(x)
    assert "pass" not in third.dataset().dims


def test_two_models_do_not_see_each_other() -> None:
    one, other = built("llama"), built("bert")
    with (
        torch.no_grad(),
        regard.watch(one, regard.Entropy()) as seen_one,
        regard.watch(other, regard.Entropy()) as seen_other,
    ):
        one(input_ids=ids(9))
        other(input_ids=ids(5))
    assert seen_one.dataset().sizes["query"] == 9
    assert seen_other.dataset().sizes["query"] == 5
    assert all(layer.startswith("encoder") for layer in seen_other.layers)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_everything_is_restored_after_an_exception() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = HandWritten()

        def forward(self, x: Tensor) -> Tensor:
            self.attention(x)
            raise ZeroDivisionError

    model, x = Failing(), torch.randn(1, 6, 32)
    with pytest.raises(ZeroDivisionError), regard.watch(model, regard.Entropy()):
        model(x)
    assert hooks(model) == 0
    assert not torch.overrides.is_tensor_like(model)
    with pytest.raises(RuntimeError, match="not run inside"), regard.watch(model, regard.Entropy()):
        model.attention.function(*torch.randn(3, 1, 4, 6, 8))
    with torch.no_grad(), regard.watch(model, regard.Entropy()) as seen:
        with pytest.raises(ZeroDivisionError):
            model(x)
        with pytest.raises(ZeroDivisionError):
            model(x)
    assert seen.layers == ["attention"]
    assert seen.dataset().sizes["pass"] == 2


def test_module_called_twice_in_a_pass_gives_two_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = HandWritten()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.attention(x))

    with torch.no_grad(), regard.watch(model := Shared(), regard.Entropy()) as seen:
        model(torch.randn(1, 6, 32))
    assert seen.layers == ["attention", "attention#1"]


def test_layers_and_heads_are_chosen() -> None:
    model, tokens = built("llama"), ids()
    with torch.no_grad(), regard.watch(model, regard.Received()) as everything:
        model(input_ids=tokens)
    full = everything.dataset().received
    with torch.no_grad(), regard.watch(model, regard.Received(), layers="*.1.*", heads=[-1, 0]) as seen:
        model(input_ids=tokens)
    chosen = seen.dataset().received
    assert chosen["head"].values.tolist() == [0, 3]
    np.testing.assert_allclose(chosen[0], full[1].sel(head=[0, 3]), atol=1e-5)
    with torch.no_grad(), regard.watch(model, regard.Received(), heads={0: 2, "*.1.*": [1, 3]}) as seen:
        model(input_ids=tokens)
    by_layer = seen.dataset().received
    np.testing.assert_allclose(by_layer[0].sel(head=2), full[0].sel(head=2), atol=1e-5)
    np.testing.assert_allclose(by_layer[1].sel(head=[1, 3]), full[1].sel(head=[1, 3]), atol=1e-5)
    assert by_layer[0].sel(head=[1, 3]).isnull().all()


def test_kept_maps_answer_later_questions() -> None:
    module, x = HandWritten(), torch.randn(1, 6, 32)
    with torch.no_grad(), regard.watch(module, keep_maps=True) as seen:
        module(x)
    np.testing.assert_allclose(seen.maps["HandWritten"][0].dense(), matrix_of(module, x), atol=1e-6)


def test_no_call_names_the_implementation_and_the_remedy() -> None:
    model = hf.BertModel(hf.BertConfig(**SMALL, **TEXT)).eval()
    model.config._attn_implementation = "flash_attention_2"  # which needs a GPU to be set
    remedy = (
        r"BertModel was not run .*, or runs attn_implementation='flash_attention_2'.*"
        r"model\.set_attn_implementation\(\"sdpa\"\)"
    )
    with pytest.raises(RuntimeError, match=remedy), regard.watch(model, regard.Entropy()):
        pass


def test_parts_that_are_not_seen_are_named_beside_those_that_are() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = built("llama"), hf.BertModel(hf.BertConfig(**SMALL, **TEXT)).eval()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.text(input_ids=tokens).logits

    pair = Pair()
    pair.image.config._attn_implementation = "flash_attention_2"
    with (
        pytest.warns(UserWarning, match=r"not seen: image \(runs attn_implementation='flash_attention_2', if it ran\)"),
        torch.no_grad(),
        regard.watch(pair, regard.Entropy()) as seen,
    ):
        pair(ids())
    assert seen.layers == ["text.model.layers.0.self_attn", "text.model.layers.1.self_attn"]


def test_no_call_in_other_models_and_blocks() -> None:
    model = nn.Linear(3, 3)
    with (
        pytest.raises(
            RuntimeError, match=r"in Linear: it was not run inside the block, or its attention is its own code"
        ),
        regard.watch(model, regard.Entropy()),
    ):
        model(torch.ones(1, 3))
    with (
        pytest.raises(RuntimeError, match="Linear: it was not run inside the block"),
        regard.watch(model, regard.Entropy()),
    ):
        pass
    with pytest.raises(RuntimeError, match="nothing in it called"), regard.watch(regard.Entropy()):
        model(torch.ones(1, 3))


def test_errors_say_what_was_seen() -> None:
    model, tokens = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)).eval(), ids()

    def run(*statistics: regard.Statistic, **options: Any) -> None:
        with torch.no_grad(), regard.watch(model, *statistics, **options):
            model(input_ids=tokens)

    with pytest.raises(ValueError, match=r"'model.layer.0.\*' matches no attention call.*model.layers.0.self_attn"):
        run(regard.Entropy(), layers="model.layer.0.*")
    with pytest.raises(IndexError, match="layer 2 was chosen, but 2 attention calls were seen"):
        run(regard.Entropy(), layers=[0, 2])
    with pytest.raises(IndexError, match=r"heads names head 4, but model.layers.0.self_attn has 4 heads, 0 to 3"):
        run(regard.Entropy(), heads=[0, 4])
    with pytest.raises(IndexError, match=r"segment 'image' ends at 20, but 12 tokens were seen"):
        run(regard.Mass({"image": slice(2, 20)}))
    with pytest.raises(ValueError, match="two statistics are named mass"):
        run(regard.Mass({"a": 0}), regard.Mass({"b": 1}))
    with pytest.raises(ValueError, match=r"token_mask has shape \(2, 11\).*batch of 2 with 12 queries"):
        run(regard.Entropy(), token_mask=torch.ones(2, 11))
    with pytest.raises(TypeError, match=r"such as regard.Entropy\(\)"):
        run(regard.Entropy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to read"):
        run()
    with pytest.raises(TypeError, match=r"needs an nn\.Module"):
        regard.watch("bert-base-uncased", regard.Entropy())  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"query holds NaN: 48 entries.*\(batch, head, token, dim\) = \(0, 0, 0, 0\)"):
        run(regard.Entropy())


def test_a_watched_call_holds_nothing_once_it_is_over() -> None:
    """What the model held at the call is freed at once, and not when garbage is collected some layers later."""
    held = []

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = 2 * x
            held.append(weakref.ref(inner))
            return torch.nn.functional.scaled_dot_product_attention(inner, inner, inner)

    model = Attention()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), regard.watch(model, regard.Entropy()):
            for _ in range(3):
                model(torch.randn(1, 2, 5, 8))
            assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()
