"""Softmax attention, whole and windowed, and what stands in the softmax's place on every key so far."""

from regard.mixers.softmax.adaptive_filter import AdaptiveFilterAttention, adaptive_filter_attention
from regard.mixers.softmax.chunked_softmax import ChunkedSoftmaxAttention, chunked_attention
from regard.mixers.softmax.sliding_window import SlidingWindow, WindowState, sliding_window_attention
from regard.mixers.softmax.softmax_attention import SoftmaxAttention

__all__ = [
    "AdaptiveFilterAttention",
    "ChunkedSoftmaxAttention",
    "SlidingWindow",
    "SoftmaxAttention",
    "WindowState",
    "adaptive_filter_attention",
    "chunked_attention",
    "sliding_window_attention",
]
