"""PyTorch's transformer layers are read without being moved from the path on which they run: R15."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import regard

# What PyTorch says of its own code: nested tensors are a prototype, and it makes masks of −∞ ones of booleans.
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors|Converting mask without torch.bool:UserWarning")

X = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(6) >= torch.tensor([4, 6, 3])[:, None]
NO_TOKENS = PADDING | (torch.arange(3) == 1)[:, None]
BAND = (torch.arange(6) - torch.arange(6)[:, None]).abs() > 1

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"padding": PADDING},
    "no tokens": {"padding": NO_TOKENS},
    "band, said to be causal": {"mask": BAND, "is_causal": True},
    "by head": {"mask": torch.rand(12, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.7},
    "both": {"mask": BAND, "padding": PADDING},
}


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(2)
    one = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)
    for parameter in one.self_attn.parameters():
        nn.init.normal_(parameter, std=0.4)
    return one.eval()


def attention(module: nn.Module, mask: Tensor | None = None, padding: Tensor | None = None, **more: Any) -> Any:
    return module(X, X, X, attn_mask=mask, key_padding_mask=padding, **more)


def without_weights(module: nn.Module, **masks: Any) -> Any:
    return attention(module, need_weights=False, **masks)


def encoded(module: nn.Module, mask: Tensor | None = None, padding: Tensor | None = None, **more: Any) -> Any:
    name = "src_mask" if isinstance(module, nn.TransformerEncoderLayer) else "mask"
    return module(X, **{name: mask}, src_key_padding_mask=padding, **more)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "attention": (lambda: layer().self_attn, without_weights),
    "attention with weights": (lambda: layer().self_attn, attention),
    "layer": (lambda: layer(norm_first=True), encoded),
    "encoder": (lambda: nn.TransformerEncoder(layer(activation="gelu"), 2).eval(), encoded),
    "encoder that nests nothing": (
        lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval(),
        encoded,
    ),
}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, NaN where NaN is."""
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(
        a is b or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())) for a, b in pairs
    )


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("make", "call"), MODULES.values(), ids=MODULES)
def test_outputs_are_those_of_the_plain_module(make: Callable[[], nn.Module], call: Any, masks: dict[str, Any]) -> None:
    module = make()
    with torch.no_grad():
        plain = call(module, **masks)
        with regard.watch(module, regard.Entropy(), regard.Received(), share=False) as seen:
            assert same(call(module, **masks), plain)
        with regard.watch(module, regard.Entropy()):
            assert same(call(module, **masks), plain)
    assert seen.dataset().sizes["layer"] == (2 if isinstance(module, nn.TransformerEncoder) else 1)


def matrix_of(module: nn.MultiheadAttention, x: Tensor, hidden: Tensor) -> Tensor:
    """What the definition gives in float64, (batch, heads, queries, keys); rows that see nothing are zero."""
    both = functional.linear(x.double(), module.in_proj_weight.double(), module.in_proj_bias.double())
    query, key, _ = both.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    return (query @ key.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_what_is_read_is_what_is_computed(norm_first: bool, masks: dict[str, Any]) -> None:
    """Layer by layer, from the inputs that each has on its fast path."""
    encoder = nn.TransformerEncoder(layer(norm_first=norm_first), 2, enable_nested_tensor=False).eval()
    padding, mask = masks.get("padding", torch.zeros(3, 6, dtype=torch.bool)), masks.get("mask")
    hidden = padding[:, None, None].expand(3, 4, 6, 6)
    hidden = hidden if mask is None else hidden | (mask if mask.ndim == 2 else mask.view(3, 4, 6, 6))
    with torch.no_grad(), regard.watch(encoder, regard.Received(), regard.Entropy(), keep_maps=True) as seen:
        encoded(encoder, **masks)
    data, x = seen.dataset(), X
    for number, one in enumerate(encoder.layers):
        real = ~x.isnan().any(-1)
        inputs = one.norm1(x.nan_to_num()) if norm_first else x.nan_to_num()
        wanted = matrix_of(one.self_attn, inputs, hidden | ~real[:, None, None])
        there = real[:, None, :, None]
        (found,) = seen.maps[f"layers.{number}.self_attn"]
        torch.testing.assert_close((found.dense() * there).double(), wanted * there, atol=1e-5, rtol=1e-4)
        received = torch.as_tensor(data.received[number].values)
        torch.testing.assert_close(received.double(), (wanted * there).sum(2), atol=1e-5, rtol=1e-4)
        entropy = torch.as_tensor(data.entropy[number].values)
        assert torch.equal(entropy.isnan(), ~real[:, None].expand(3, 4, 6))
        with torch.no_grad():
            x = one(x, src_mask=mask, src_key_padding_mask=masks.get("padding"))


def test_texts_that_are_nested() -> None:
    """Padding is not there: its queries are NaN, also without a mask of the user's, and are received from by none."""
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    with torch.no_grad(), regard.watch(encoder, regard.Received(), regard.Entropy()) as seen:
        encoded(encoder, padding=PADDING)
    data = seen.dataset()
    for row, length in enumerate([4, 6, 3]):
        with torch.no_grad(), regard.watch(encoder, regard.Received(), regard.Entropy()) as alone:
            encoder(X[row : row + 1, :length])
        for name, dim in {"received": "key", "entropy": "query"}.items():
            mine, wanted = (torch.as_tensor(d[name].values) for d in (data, alone.dataset()))
            torch.testing.assert_close(mine[:, row, :, :length], wanted[:, 0], atol=1e-5, rtol=1e-4)
            assert data.sizes[dim] == 6
        assert data.entropy[:, row, :, length:].isnull().all()
        assert not data.received[:, row, :, length:].any()


@pytest.mark.parametrize("make", [layer, lambda: layer().self_attn], ids=["layer", "attention"])
def test_texts_that_the_user_nests(make: Callable[[], nn.Module]) -> None:
    module = make()
    texts = torch.nested.nested_tensor([X[0, :4], X[1], X[2, :3]])

    def run(x: Tensor) -> Tensor:
        return module(x) if isinstance(module, nn.TransformerEncoderLayer) else module(x, x, x, need_weights=False)[0]

    with torch.no_grad():
        plain = run(texts)
        with regard.watch(module, regard.Received()) as seen:
            output = run(texts)
    assert all(map(torch.equal, output.unbind(), plain.unbind()))
    for row, length in enumerate([4, 6, 3]):
        with torch.no_grad(), regard.watch(module, regard.Received()) as alone:
            run(X[row : row + 1, :length])
        mine, wanted = (torch.as_tensor(s.dataset().received[0].values) for s in (seen, alone))
        torch.testing.assert_close(mine[row, :, :length], wanted[0], atol=1e-5, rtol=1e-4)
        assert not mine[row, :, length:].any()


def test_a_bias_hides_in_a_layer_on_its_fast_path() -> None:
    """As PyTorch has it: any number but zero."""
    one, bias = layer(), torch.zeros(6, 6)
    bias[:, 2] = 0.5
    with torch.no_grad(), regard.watch(one, regard.Received()) as seen:
        output = one(X, src_mask=bias)
    assert not seen.dataset().received.sel(key=2).any()
    with torch.no_grad():
        assert torch.equal(output, one(X, src_mask=bias > 0))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_dropout_is_the_models_own(need_weights: bool, share: bool) -> None:
    module = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    torch.manual_seed(3)
    plain, after = attention(module, padding=PADDING, need_weights=need_weights), torch.get_rng_state()
    torch.manual_seed(3)
    with regard.watch(module, regard.Entropy(), share=share) as seen:
        assert same(attention(module, padding=PADDING, need_weights=need_weights), plain)
    assert torch.equal(torch.get_rng_state(), after)
    with torch.no_grad(), regard.watch(module.eval(), regard.Entropy()) as evaluated:
        attention(module, padding=PADDING)
    torch.testing.assert_close(*(torch.as_tensor(s.dataset().entropy.values) for s in (seen, evaluated)))


class Operators(TorchDispatchMode):
    """The names of the operators that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


BESIDE: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "another layer": lambda encoder: regard.watch(encoder, regard.Received(), layers=0),
    "another model": lambda encoder: regard.watch(encoder.layers[0].self_attn, regard.Received()),
    "another model steered": lambda encoder: regard.steer(encoder.layers[0], regard.Gate(2.0)),
}


@pytest.mark.parametrize("block", BESIDE.values(), ids=BESIDE)
def test_layers_that_are_not_looked_at_cost_nothing(block: Callable[[nn.Module], Any]) -> None:
    encoder = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        first = encoder.layers[0](X)
        with Operators() as plain:
            expected = encoder.layers[1](first)
        with block(encoder):
            encoder(X)
            with Operators() as beside:
                output = encoder.layers[1](first)
    assert torch.equal(output, expected)
    assert beside.names == plain.names == ["_transformer_encoder_layer_fwd"]


@pytest.mark.parametrize("part", ["layers.0.self_attn", "layers.0", ""])
def test_parts_of_an_encoder_and_forward_itself(part: str) -> None:
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    watched = encoder.get_submodule(part)
    with torch.no_grad(), regard.watch(encoder, regard.Received()) as seen:
        encoder(X)
    wanted = seen.dataset().received[: 1 if part else 2]
    with torch.no_grad(), regard.watch(watched, regard.Received()) as seen:
        encoder.forward(X)
    torch.testing.assert_close(torch.as_tensor(seen.dataset().received.values), torch.as_tensor(wanted.values))
    names = {"layers.0.self_attn": "MultiheadAttention", "layers.0": "self_attn", "": "layers.0.self_attn"}
    assert seen.layers[0] == names[part]


def test_steered_layers_leave_the_fast_path() -> None:
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[:, 0] = True
    with torch.no_grad():
        wanted = encoder(X, mask=hidden)
        for model in (None, encoder):
            with regard.steer(model, regard.Block(keys=[0])):
                torch.testing.assert_close(encoder(X), wanted, atol=1e-5, rtol=1e-4)


def test_other_threads_keep_the_fast_path() -> None:
    encoder, answers = nn.TransformerEncoder(layer(), 2).eval(), []
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        go.wait(60)
        with torch.no_grad():
            answers.append(encoded(encoder, padding=PADDING))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad():
        plain = encoded(encoder, padding=PADDING)
        with regard.steer(None, regard.Gate(2.0)), regard.watch(regard.Entropy()):
            go.set()
            assert done.wait(60)
            encoder(X)
    thread.join()
    assert same(answers[0], plain)


@pytest.fixture
def turned_off() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("turned_off")
def test_who_turned_it_off_has_it_off() -> None:
    one = layer()
    with torch.no_grad(), Operators() as plain:
        expected = one(X)
    with torch.no_grad(), regard.watch(one, regard.Received(), share=False), Operators() as watched:
        output = one(X)
    assert torch.equal(output, expected)
    assert "_transformer_encoder_layer_fwd" not in plain.names + watched.names
