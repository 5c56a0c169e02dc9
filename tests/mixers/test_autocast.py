"""Under autocast a layer is as exact as bfloat16 is."""

import pytest
import torch

from regard.mixers import catalogue


@pytest.mark.parametrize("name", sorted(catalogue.mixers()))
def test_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    mixer, x = catalogue.mixers()[name](32).eval(), torch.randn(2, 120, 32)
    with torch.no_grad():
        expected, _ = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found, state = mixer(x[:, :-1])
            last, _ = mixer.decode(x[:, -1], state)
    error = torch.cat([found, last[:, None]], 1).float() - expected
    assert error.norm() < 0.02 * expected.norm()
