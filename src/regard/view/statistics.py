"""The statistics of a head: their titles, their units and how to read a picture of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistic:
    """How one statistic is shown: its title, its unit, and one sentence that explains its picture."""

    title: str
    unit: str
    sentence: str


STATISTICS = {
    "entropy": Statistic(
        "Entropy",
        "nats",
        "The stronger the colour, the more tokens a head looks at; a faint one looks at few.",
    ),
    "sink": Statistic(
        "Sink",
        "share of attention",
        "The stronger the colour, the more attention a head parks on the first token and on special tokens.",
    ),
    "previous": Statistic(
        "Previous token",
        "share of attention",
        "The stronger the colour, the more a token looks at the token just before it.",
    ),
    "own": Statistic(
        "Own token",
        "share of attention",
        "The stronger the colour, the more a token looks at itself.",
    ),
    "induction": Statistic(
        "Induction",
        "share of attention",
        "The stronger the colour, the more a token looks at what followed its own last occurrence and follows again.",
    ),
    "retrieval": Statistic(
        "Retrieval",
        "share of attention",
        "The stronger the colour, the more a token looks at what is about to be copied from an earlier passage.",
    ),
    "mean_distance": Statistic(
        "Mean distance",
        "tokens",
        "The stronger the colour, the farther away the tokens that a head looks at.",
    ),
    "class_token": Statistic(
        "Class token",
        "share of attention",
        "The stronger the colour, the more attention a head parks on the class token and on registers.",
    ),
    "own_patch": Statistic(
        "Own patch",
        "share of attention",
        "The stronger the colour, the more a patch looks at itself.",
    ),
    "neighbour": Statistic(
        "Neighbour",
        "share of attention",
        "The stronger the colour, the more a patch looks at one of the eight beside it, always the same.",
    ),
    "surroundings": Statistic(
        "Surroundings",
        "share of attention",
        "The stronger the colour, the more attention stays on the patch and the eight around it.",
    ),
    "grid_distance": Statistic(
        "Distance",
        "patches",
        "The stronger the colour, the farther away on the image a head looks: the root of the mean square.",
    ),
    "local": Statistic(
        "Local",
        "share of attention",
        "The stronger the colour, the more attention stays within eight tokens on either side.",
    ),
    "positional": Statistic(
        "Positional",
        "share of attention",
        "The stronger the colour, the more attention goes to one fixed distance, whatever stands there.",
    ),
    "offset": Statistic(
        "Offset",
        "tokens",
        "The number is the fixed distance that gets the most attention, negative for tokens before.",
    ),
    "broad": Statistic(
        "Broad",
        "share of the largest possible entropy",
        "The stronger the colour, the closer a head comes to looking at all tokens evenly.",
    ),
    "score": Statistic(
        "Score",
        "",
        "The stronger the colour, the more clearly a head is of the kind that it is named after.",
    ),
}
