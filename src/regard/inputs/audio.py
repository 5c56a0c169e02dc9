"""Recordings of speech for Whisper and its like: frames of time are the encoder's tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from regard.inputs.reading import Reading, Tokens, no_special
from regard.inputs.target import read_with_target

Samples = NDArray[numpy.float32]
SOUND, SILENCE = "recording", "silence after it"


def read_audio(model: Any, processor: Any, audio: str | Path | Samples, target: str | None = None) -> Reading:
    """A recording for a model that writes what is said in it.

    Args:
        model: an encoder–decoder of transformers for speech, such as Whisper.
        processor: with its feature extractor and its tokenizer.
        audio: a .wav file, or samples from −1 to 1 of one channel at the rate that the model reads.
        target: what the decoder reads; by default what the model writes itself, greedily, of at most 64 tokens.

    Raises:
        ImportError: SciPy, which reads .wav files, is not installed.
        ValueError: a file that is no .wav file; a recording that is empty, or longer than the model reads at once; as
            `read_with_target`.
    """
    extractor = processor.feature_extractor
    rate = int(extractor.sampling_rate)
    samples = audio if isinstance(audio, numpy.ndarray) else read_wav(audio, rate)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"a recording is one row of samples, got shape {samples.shape}")
    seconds, longest = samples.size / rate, float(getattr(extractor, "chunk_length", math.inf))
    if seconds > longest:
        raise ValueError(f"the recording lasts {seconds:.1f} s, but the model reads {longest:g} s at once; cut it")
    features = extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
    inputs = {"input_features": features.to(next(model.parameters()))}
    return read_with_target(
        model, processor.tokenizer, inputs, lambda number: _frames(number, seconds, longest), target
    )


def _frames(frames: int, seconds: float, longest: float) -> Tokens:
    """The encoder's tokens, called by the second at which they begin."""
    step = longest / frames if math.isfinite(longest) else seconds / frames
    sounding = min(math.ceil(seconds / step), frames)
    names = tuple(f" {number * step:.2f}\N{NO-BREAK SPACE}s" for number in range(frames))
    segments = {SOUND: range(sounding), SILENCE: range(sounding, frames)} if sounding < frames else {}
    return Tokens(names, no_special(frames), ordered=True, segments=segments)


def read_wav(file: str | Path, rate: int) -> Samples:
    """The samples of a .wav file, from −1 to 1, its channels' mean, at so many a second.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: no such file, or none that holds samples.
    """
    try:
        from scipy.io import wavfile
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError('recordings need SciPy: pip install "regard[audio]"') from error
    try:
        own, samples = wavfile.read(file)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {file}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no .wav file ({error}); ffmpeg -i {file} recording.wav makes one") from error
    if samples.dtype.kind == "u":  # eight bits, with silence at 128
        samples = (samples.astype(numpy.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(numpy.float32) / -float(numpy.iinfo(samples.dtype).min)
    samples = samples.reshape(len(samples), -1).mean(1, dtype=numpy.float32)
    common = math.gcd(own, rate)
    if own != rate:
        samples = resample_poly(samples, rate // common, own // common)
    return numpy.asarray(samples, numpy.float32)
