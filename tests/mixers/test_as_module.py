"""What trainers expect of a layer: masks as tokenizers make them, weights made anew, and marks against weight decay."""

import pytest
import torch

from regard.mixers import catalogue

NAMES = sorted(catalogue.mixers())
MARKED = {
    "AdaptiveFilterAttention": {"log_decay", "log_process", "log_freedom", "log_sharpness"},
    "CHELA": {"long.log_rate"},
    "GatedDeltaRule": {"A_log", "dt_bias"},
    "LongVQ": {"average.log_rate"},
    "SelectiveSSM": {"A_log", "D"},
}


def test_masks_of_whole_numbers() -> None:
    mixer, x, mask = catalogue.mixers()["DeltaRule"](8), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    torch.testing.assert_close(mixer(x, mask=mask)[0], mixer(x, mask=mask.bool())[0])
    with pytest.raises(
        ValueError, match=r"the mask of DeltaRule tells real tokens by 1 and padding by 0, got \[0, 1, 2\]"
    ):
        mixer(x, mask=mask + mask.flip(0) * (mask > 0))
    with pytest.raises(
        ValueError, match=r"DeltaRule takes a boolean mask of shape \(2, 5\), got torch.float32 \(2, 5\)"
    ):
        mixer(x, mask=mask.float())


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_made_anew(name: str) -> None:
    kind = catalogue.mixers()[name]
    with torch.device("meta"):
        mixer = kind(16)
    mixer.to_empty(device="cpu")
    torch.manual_seed(1)
    mixer.reset_parameters()
    torch.manual_seed(1)
    expected = kind(16).state_dict()
    assert all(torch.equal(tensor, expected[part]) for part, tensor in mixer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_marked_against_weight_decay(name: str) -> None:
    parameters = catalogue.mixers()[name](16).double().named_parameters()
    marked = {part for part, parameter in parameters if getattr(parameter, "_no_weight_decay", False)}
    assert marked == MARKED.get(name, set())
