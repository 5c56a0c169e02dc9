"""Recordings: frames of time are the encoder's tokens, and words the decoder's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from regard.inputs.audio import read_wav
from regard.look import look
from regard.view.segments import between
from tests.inputs.models import sound, whisper


def test_parts_are_those_of_the_stored_matrices() -> None:
    model, processor = whisper()
    seen = look(model, processor, audio=sound(0.5), target="he slept")
    names = ["Encoder self-attention", "Decoder self-attention", "Cross-attention"]
    assert [part.name for part in seen.parts] == names
    encoder, decoder, cross = (part.dataset for part in seen.parts)
    assert encoder.key_token[0].values[[0, 1, 99]].tolist() == [" 0.00\xa0s", " 0.02\xa0s", " 1.98\xa0s"]
    assert decoder.key_token[0].values.tolist() == ["<|start|>", "he", "slept"]
    features = processor.feature_extractor(sound(0.5), sampling_rate=16_000, return_tensors="pt").input_features
    ids = torch.tensor([processor.tokenizer.convert_tokens_to_ids(["<|start|>", "he", "slept"])])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        told = model(input_features=features, decoder_input_ids=ids, output_attentions=True)
    stored: list[Any] = [told.encoder_attentions, told.decoder_attentions, told.cross_attentions]
    for data, matrices in zip((encoder, decoder, cross), stored, strict=True):
        for layer, matrix in enumerate(matrices):
            dense = matrix[0].double().numpy()
            np.testing.assert_allclose(data.received[layer, 0], dense.sum(1), rtol=1e-3, atol=1e-5)
    silence = told.cross_attentions[0][0, :, :, 25:].double().sum(-1).mean(-1)
    np.testing.assert_allclose(cross.mass[0, 0].sel(segment="silence after it").mean("query"), silence, atol=1e-5)
    assert list(between(encoder)) == ["recording → silence after it", "silence after it → recording"]
    assert "induction" not in encoder.target.values
    assert cross.pooled.sizes["row"] == 3


def test_a_recording_as_long_as_the_model_reads_has_no_silence_after_it() -> None:
    encoder = look(*whisper(), audio=sound(2.0), target="he slept").parts[0].dataset
    assert "mass" not in encoder


def test_without_a_target_the_model_writes_one() -> None:
    model, processor = whisper()
    seen = look(model, processor, audio=sound(0.5))
    assert seen.parts[1].dataset.key_token[0].values[0] == "<|start|>"
    assert seen.notes[0].startswith("no --target was given: the decoder reads what the model itself writes")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_all_kinds_hold_the_same_samples(dtype: str, channels: int, tmp_path: Path) -> None:
    samples = sound(0.1)
    scale, centre = {"uint8": (128, 128), "int16": (2**15, 0), "int32": (2**31, 0), "float32": (1, 0)}[dtype]
    written = (samples.astype(np.float64) * scale + centre).astype(dtype)
    wavfile.write(tmp_path / "tone.wav", 16_000, np.stack([written] * channels, 1) if channels > 1 else written)
    found = read_wav(tmp_path / "tone.wav", 16_000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=0.009 if dtype == "uint8" else 1e-4)


def test_other_rates_are_changed_to_the_models(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "tone.wav", 44_100, sound(0.5, 44_100))
    found = read_wav(tmp_path / "tone.wav", 16_000)
    assert found.shape == (8_000,)
    np.testing.assert_allclose(found[1000:-1000], sound(0.5)[1000:-1000], atol=5e-3)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [(2.5, r"the recording lasts 2.5 s, but the model reads 2 s at once; cut it"), (0, r"got shape \(0,\)")],
)
def test_recordings_that_cannot_be_read(seconds: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        look(*whisper(), audio=sound(seconds))


def test_files_that_are_no_recordings(tmp_path: Path) -> None:
    (tmp_path / "speech.mp3").write_bytes(b"ID3" + bytes(100))
    with pytest.raises(ValueError, match=r"speech\.mp3 is no \.wav file .*; ffmpeg -i .* recording\.wav makes one"):
        look(*whisper(), audio=tmp_path / "speech.mp3")
    with pytest.raises(ValueError, match=r"there is no file nothing\.wav"):
        look(*whisper(), audio="nothing.wav")
