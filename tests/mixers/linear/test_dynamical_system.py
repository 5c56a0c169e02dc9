"""Every row of the table, run by the generic recurrence, is the mechanism."""

from collections.abc import Callable

import pytest
import torch

from regard.mixers.linear import (
    FAST,
    DeltaRule,
    DynamicalSystem,
    GatedDeltaRule,
    LightNet,
    LightningAttention,
    Mixer,
    SelectiveSSM,
)

ROWS: list[Callable[..., Mixer]] = [DeltaRule, FAST, GatedDeltaRule, LightNet, LightningAttention]


@pytest.mark.parametrize("kind", ROWS)
def test_the_row_is_the_mechanism(kind: Callable[..., Mixer]) -> None:
    torch.manual_seed(0)
    mixer, x = kind(16, heads=2).double().eval(), torch.randn(2, 23, 16).double()
    system, hidden = mixer.system(x), mixer.map(x)
    torch.testing.assert_close(system.matrix(), hidden.dense(), atol=1e-6, rtol=1e-4)


def test_the_row_of_the_selective_state_space() -> None:
    torch.manual_seed(0)
    mixer, x = SelectiveSSM(16).double().eval(), torch.randn(2, 23, 16).double()
    torch.testing.assert_close(mixer.system(x).matrix(), mixer.map(x).dense(), atol=1e-6, rtol=1e-5)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"of one shape .* got \(1, 2, 5, 4\), \(1, 2, 5, 3\), \(1, 2, 5, 4\)"):
        DynamicalSystem(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 3))
