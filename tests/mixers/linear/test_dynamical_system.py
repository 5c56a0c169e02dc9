"""Every row of the table, run by the generic recurrence, is the mechanism."""

import pytest
import torch

from regard.mixers.linear import DeltaRule, DynamicalSystem, GatedDeltaRule, Mixer

ROWS: list[type[Mixer]] = [DeltaRule, GatedDeltaRule]


@pytest.mark.parametrize("kind", ROWS)
def test_the_row_is_the_mechanism(kind: type[Mixer]) -> None:
    torch.manual_seed(0)
    mixer, x = kind(16, heads=2).double().eval(), torch.randn(2, 23, 16).double()
    system, hidden = mixer.system(x), mixer.map(x)
    torch.testing.assert_close(system.matrix(), hidden.dense(), atol=1e-8, rtol=1e-6)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"of one shape .* got \(1, 2, 5, 4\), \(1, 2, 5, 3\), \(1, 2, 5, 4\)"):
        DynamicalSystem(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 3))
