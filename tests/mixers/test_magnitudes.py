"""Hidden matrices read by the size of their entries."""

import numpy as np
import pytest
import torch
import transformers as hf

import regard
from regard.mixers import DeltaRule, SelectiveSSM, replace_linear_layers
from regard.mixers.magnitudes import InMagnitudes, Magnitudes
from regard.runtime import entered


def shares(matrix: torch.Tensor) -> np.ndarray:
    sizes = matrix.detach().abs().double()
    return (sizes / sizes.sum(-1, keepdim=True)).numpy()


def test_rows_are_the_sizes_of_the_entries_divided_by_their_sum() -> None:
    hidden = DeltaRule(32, heads=4).map(torch.randn(2, 30, 32))
    with torch.no_grad():
        found = Magnitudes(hidden)
    expected = shares(hidden.dense())
    assert (hidden.dense() < 0).any()
    np.testing.assert_allclose(found.dense(), expected, atol=1e-6)
    np.testing.assert_allclose(found.received(), expected.sum(2), atol=1e-5)
    np.testing.assert_allclose(found.entropy(), -(expected * np.log(expected + 1e-300)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found.heads([1, 3]).dense(), expected[:, [1, 3]], atol=1e-6)


@pytest.mark.parametrize(("channels", "read"), [(96, range(96)), (600, [n * 600 // 256 for n in range(256)])])
def test_of_many_channels_the_mean_of_some_is_read_group_by_group(
    channels: int, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.mixers.magnitudes._NUMBERS_AT_ONCE", 20 * 20 * 7)
    hidden = SelectiveSSM(channels // 2).map(torch.randn(1, 20, channels // 2))
    assert hidden.shape[1] == channels
    with torch.no_grad():
        found = Magnitudes(hidden).dense()
    np.testing.assert_allclose(found, shares(hidden.dense())[:, list(read)].mean(1, keepdims=True), atol=1e-6)


def test_watch_reads_a_model_without_attention_as_one_with_it() -> None:
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4)
    model = hf.MambaModel(config).eval()
    replace_linear_layers(model)
    ids, by_size = torch.arange(12)[None], InMagnitudes()
    with torch.no_grad(), entered(by_size, model), regard.watch(model, regard.Entropy(), regard.Received()) as seen:
        with_it = model(ids).last_hidden_state
    torch.testing.assert_close(with_it, model(ids).last_hidden_state)
    np.testing.assert_allclose(seen.dataset().received.sum("key"), 12, rtol=1e-5)
    assert by_size.read == {"layers.0.mixer.mixer": 32, "layers.1.mixer.mixer": 32}
    assert "layers without attention, 2 of them, are shown by the size" in by_size.notes()[0]


def test_attention_is_left_as_it_is(mini: tuple[torch.nn.Module, object]) -> None:
    model, by_size = mini[0], InMagnitudes()
    ids = torch.arange(12)[None]
    with torch.no_grad(), regard.watch(model, regard.Received()) as plain:
        model(ids)
    with torch.no_grad(), entered(by_size, model), regard.watch(model, regard.Received()) as seen:
        model(ids)
    assert seen.dataset().identical(plain.dataset())
    assert by_size.notes() == []


def test_long_texts_are_refused() -> None:
    hidden = DeltaRule(8, heads=1).map(torch.randn(1, 1025, 8))
    with pytest.raises(ValueError, match=r"up to 1,024 tokens, got 1,025; pass --max-tokens 1024"):
        Magnitudes(hidden)
