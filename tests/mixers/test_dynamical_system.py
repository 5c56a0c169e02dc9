"""Every mixer has a row of the table, which run by the generic recurrence is the mechanism, or says why there is none."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from regard.mixers import (
    KL,
    Decay,
    Design,
    DotProduct,
    DynamicalSystem,
    Huber,
    LongVQ,
    Lp,
    Lq,
    Memory,
    Miras,
    Mixer,
    SlidingWindow,
    SoftmaxAttention,
    codebook_attention,
    dynamical_system,
    neural_memory,
    sliding_window_attention,
)
from regard.mixers.catalogue import mixers

TOKENS, WIDTH = 23, 8  # of a head: DIM over two heads
DIM = 2 * WIDTH
MATRIX = Memory(depth=1)
NETWORK = r"{name} mixes values by a matrix only where its memory is one, .* this is Design\(memory=Memory\(depth=2"
VARIANT = r"{name} is no linear dynamical system: its memory and its attention have values of their own"

SYSTEMS: dict[str, tuple[dict[str, Any], int]] = {  # what each is made with, beside the width, and S
    "AdaptiveFilterAttention": ({"heads": 2}, TOKENS),
    "Based": ({"heads": 2, "features": 3, "window": 12}, 12),
    "CHELA": ({"heads": 2}, WIDTH),
    "ChunkedSoftmaxAttention": ({"heads": 2, "query_chunk": 5, "key_chunk": 7}, TOKENS),
    "DeltaRule": ({"heads": 2}, WIDTH),
    "FAST": ({"heads": 2}, 1 + WIDTH + WIDTH * (WIDTH + 1) // 2),
    "GatedDeltaRule": ({"heads": 2}, WIDTH),
    "GatedLinearAttention": ({"heads": 2, "expand_k": 1.0}, WIDTH),
    "LightNet": ({"heads": 2}, 2 * WIDTH),
    "LightningAttention": ({"heads": 2}, 2 * WIDTH),
    "LongTermMemory": ({"heads": 2, "memory": MATRIX, "chunk": 8}, 3 * WIDTH),
    "LongVQ": ({"heads": 2, "codes": 6, "window": 5}, 5 + 6),
    "Miras": ({"heads": 2, "design": Design(MATRIX), "chunk": 8}, 2 * WIDTH),
    "SelectiveSSM": ({"state_size": 7}, 7),
    "SlidingWindow": ({"heads": 2, "window": 5}, 5),
    "SoftmaxAttention": ({"heads": 2}, TOKENS),
    "TaylorAttention": ({"heads": 2, "features": 4}, 1 + 4 + 4 * 5 // 2),
}
NO_SYSTEMS = {  # and what they say
    "Memora": NETWORK,
    "MemoryAsContext": VARIANT,
    "MemoryAsGate": VARIANT,
    "MemoryAsLayer": VARIANT,
    "Moneta": NETWORK,
    "Yaad": NETWORK,
}
MORE: list[tuple[str, dict[str, Any]]] = [
    ("Based", {"heads": 2, "features": 8, "window": 3}),
    ("FAST", {"heads": 2, "order": 1}),
    ("DeltaRule", {"heads": 1, "num_v_heads": 2, "head_dim": 3, "use_beta": False, "qk_norm": "sum"}),
    ("GatedDeltaRule", {"heads": 1, "num_v_heads": 2, "head_dim": 4, "expand_v": 2.0, "allow_neg_eigval": True}),
    ("GatedLinearAttention", {"heads": 2, "num_kv_heads": 1, "use_short_conv": True}),
    ("LightningAttention", {"heads": 2, "turned": False}),
    ("LongTermMemory", {"heads": 2, "memory": MATRIX, "chunk": 1}),
    ("LongTermMemory", {"heads": 2, "memory": MATRIX, "chunk": 40}),
    ("LongVQ", {"heads": 2, "codes": 3, "window": 1}),
    ("LongVQ", {"heads": 2, "window": 30}),
    ("Miras", {"heads": 2, "design": Design(MATRIX, DotProduct()), "chunk": 5}),
    ("Miras", {"heads": 2, "design": Design(MATRIX, DotProduct(), momentum=True), "chunk": 5}),
    ("SlidingWindow", {"heads": 2, "window": 1}),
    ("SlidingWindow", {"heads": 2, "window": 30, "rotary": None}),
]


def made(name: str, choices: dict[str, Any]) -> tuple[Mixer, Tensor]:
    """A mixer in float64, whose parameters are not those it begins with, and tokens."""
    torch.manual_seed(0)
    mixer = mixers()[name](DIM, **choices).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, torch.randn(2, TOKENS, DIM).double()


def check(mixer: Mixer, x: Tensor) -> DynamicalSystem:
    system, hidden = mixer.system(x), mixer.map(x)
    expected = hidden.dense()
    torch.testing.assert_close(system.matrix(), expected, atol=1e-12, rtol=1e-9)
    values = torch.randn(*expected.shape[:3], WIDTH).double()
    found, _ = system.run(values, values.new_zeros(*expected.shape[:2], system.state_size, WIDTH))
    torch.testing.assert_close(found, hidden @ values, atol=1e-12, rtol=1e-9)
    return system


def test_every_mixer_has_a_row_or_a_reason() -> None:
    assert not set(SYSTEMS) & set(NO_SYSTEMS)
    assert set(SYSTEMS) | set(NO_SYSTEMS) == set(mixers())
    for name in mixers():
        assert name in str(dynamical_system.__doc__), f"the table does not say what {name} is"


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_row_is_the_mechanism(name: str) -> None:
    choices, size = SYSTEMS[name]
    assert check(*made(name, choices)).state_size == size


@pytest.mark.parametrize(("name", "choices"), MORE)
def test_the_row_is_the_mechanism_of_other_choices(name: str, choices: dict[str, Any]) -> None:
    check(*made(name, choices))


@pytest.mark.parametrize("name", NO_SYSTEMS)
def test_what_is_no_system_says_why(name: str) -> None:
    mixer, x = made(name, {"heads": 2})
    with pytest.raises(NotImplementedError, match=NO_SYSTEMS[name].format(name=name)):
        mixer.system(x)
    with pytest.raises(NotImplementedError):
        mixer.map(x)


@pytest.mark.parametrize(
    "design",
    [
        Design(Memory(depth=2)),
        Design(MATRIX, Lp(3)),
        Design(MATRIX, Huber()),
        Design(MATRIX, retention=Lq(4)),
        Design(MATRIX, retention=KL()),
    ],
)
def test_memories_that_are_no_systems_say_why(design: Design) -> None:
    mixer, x = made("Miras", {"heads": 2, "design": design})
    with pytest.raises(NotImplementedError, match=r"kept by decay and written by ℓ₂ or a dot product; this is Design"):
        mixer.system(x)


def test_memories_are_not_linear_in_values_where_they_say_so() -> None:
    """Half of all values give another output than half of it; with a matrix, bias ℓ₂ and decay they do not."""
    torch.manual_seed(0)
    q, k, v = functional.normalize(torch.randn(3, 1, 2, TOKENS, WIDTH).double(), dim=-1)
    gates = {"step": torch.full((1, 2, TOKENS), 0.5).double(), "threshold": torch.full_like(v, 0.1)}
    matrix, network = [torch.zeros(2, WIDTH, WIDTH).double()], list(torch.randn(2, 2, WIDTH, WIDTH).double())
    cases = [
        (network, Lp(2), Decay()), (matrix, Lp(3), Decay()), (matrix, Huber(), Decay()), (matrix, Lp(2), Lq(4)),
        (matrix, Lp(2), KL()), (matrix, Lp(2), Decay()), (matrix, DotProduct(), Decay()),
    ]  # fmt: skip
    linear = []
    for weights, bias, retention in cases:
        none, half, whole = (
            neural_memory(q, k, part * v, weights=weights, bias=bias, retention=retention, chunk=8, **gates)[0]
            for part in (0.0, 0.5, 1.0)
        )
        linear.append(torch.allclose((none + whole) / 2, half, atol=1e-6))
    assert linear == [False] * 5 + [True] * 2


def test_a_memory_begins_with_what_it_has_learned() -> None:
    for momentum in (False, True):
        mixer, x = made("Miras", {"heads": 2, "design": Design(MATRIX, momentum=momentum), "chunk": 8})
        assert isinstance(mixer, Miras)
        system, projected = mixer.system(x), mixer.project(x)
        found, after = system.run(projected.value)
        y, state = mixer(x)
        torch.testing.assert_close(mixer.out(found, projected), y)
        kept = torch.cat([state.tensors[name].mT for name in ("held0", "start0", "surprise0")[: 2 + momentum]], dim=2)
        torch.testing.assert_close(after, kept)


def test_the_window_is_the_functional_form() -> None:
    mixer, x = made("SlidingWindow", {"heads": 2, "window": 5})
    assert isinstance(mixer, SlidingWindow)
    projected = mixer.project(x)
    query, key, value = projected["query"], projected["key"], projected.value
    expected, state = sliding_window_attention(query, key, value, 5, rotary=mixer.rotary, form="recurrent")
    found, after = mixer.system(x).run(value)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after[:, :, 1:], state.value)


def test_the_codebook_is_the_functional_form() -> None:
    mixer, x = made("LongVQ", {"heads": 2, "codes": 4, "window": 5})
    assert isinstance(mixer, LongVQ)
    projected = mixer.project(x)
    query, key, value = projected["query"], projected["key"], projected.value
    expected, state = codebook_attention(query, key, value, mixer.codebook, mixer.bias, form="recurrent")
    found, after = mixer.system(x).run(value)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after[:, :, 1:5], state.value)
    # The oldest slot leaves the window as the next token comes; between the two, the functional form has let go of it.
    torch.testing.assert_close(after[:, :, 5:].sum(2) + after[:, :, 0], state.total.sum(2))


@pytest.mark.parametrize("name", ["SoftmaxAttention", "LightningAttention", "LongTermMemory"])
def test_runs_go_on_from_a_state(name: str) -> None:
    system = made(name, SYSTEMS[name][0])[0].system(made(name, SYSTEMS[name][0])[1])
    values = torch.randn(2, 2, TOKENS, WIDTH).double()
    whole, last = system.run(values)
    state = None
    for part in (slice(0, 10), slice(10, TOKENS)):
        step = system.transition if system.transition.shape[2] == 1 else system.transition[:, :, part]
        begun = DynamicalSystem(step, system.into[:, :, part], system.out[:, :, part], system.before)
        found, state = begun.run(values[:, :, part], state)
        torch.testing.assert_close(found, whole[:, :, part])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("name", ["ChunkedSoftmaxAttention", "SoftmaxAttention"])
def test_softmax_attention_is_what_its_slots_give(name: str) -> None:
    mixer, x = made(name, SYSTEMS[name][0])
    assert isinstance(mixer, SoftmaxAttention)
    seen = mixer.project(x)
    found, after = mixer.system(x).run(seen.value)
    torch.testing.assert_close(found, mixer.combine(seen)[0])
    torch.testing.assert_close(after, seen.value)


def test_shapes_are_checked() -> None:
    ones = torch.ones(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"of one shape .* got \(1, 2, 5, 4\), \(1, 2, 5, 3\), \(1, 2, 5, 4\)"):
        DynamicalSystem(ones, ones, ones[..., :3])
    with pytest.raises(ValueError, match=r"may be 1, got \(1, 2, 5, 4\), \(1, 2, 5, 4\), \(1, 2, 3, 4\)"):
        DynamicalSystem(ones[:, :, :3], ones, ones)
    with pytest.raises(ValueError, match=r"before must be of shape \(1, 2, 4, 3\), got \(1, 1, 4, 3\)"):
        DynamicalSystem(ones, ones, ones, torch.ones(1, 1, 4, 3))
    system = DynamicalSystem(ones, ones, ones)
    with pytest.raises(ValueError, match=r"values must be \(1, 2, 5, width\), got \(1, 2, 4, 3\)"):
        system.run(torch.ones(1, 2, 4, 3))
    with pytest.raises(ValueError, match=r"the state must be of shape \(1, 2, 4, 3\), got \(1, 2, 4, 1\)"):
        system.run(torch.ones(1, 2, 5, 3), torch.ones(1, 2, 4, 1))
