"""One grammar for places: positions of keys and queries, layers, heads and passes; passages, grids and image tokens."""

from regard.tokens.chat import chat_text
from regard.tokens.decoder import decoder_layers, decoder_of
from regard.tokens.encoding import Encoded, encode, max_positions
from regard.tokens.grid import Grid
from regard.tokens.images import AfterImage, ImageTokens, image_tokens
from regard.tokens.passages import locate
from regard.tokens.positions import Positions, Where, among, check, check_form, indices, plain, resolve
from regard.tokens.selection import Heads, Layers, Passes, Selection, parse_layers
from regard.tokens.spelling import Spelling, spelling_of

__all__ = [
    "AfterImage",
    "Encoded",
    "Grid",
    "Heads",
    "ImageTokens",
    "Layers",
    "Passes",
    "Positions",
    "Selection",
    "Spelling",
    "Where",
    "among",
    "chat_text",
    "check",
    "check_form",
    "decoder_layers",
    "decoder_of",
    "encode",
    "image_tokens",
    "indices",
    "locate",
    "max_positions",
    "parse_layers",
    "plain",
    "resolve",
    "spelling_of",
]
