"""Every mixer is listed, with facts that hold, an example that runs and a measured exponent; the command shows them."""

import math
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.mixers import Mixer, catalogue

NAMES = sorted(catalogue.mixers())
runner = CliRunner()


def every_kind(base: type[Mixer]) -> set[type[Mixer]]:
    return {base}.union(*(every_kind(kind) for kind in base.__subclasses__()))


def test_every_mixer_of_the_package_is_listed() -> None:
    own = {kind for kind in every_kind(Mixer) if kind.__module__.startswith("regard.") and "facts" in vars(kind)}
    assert set(catalogue.mixers().values()) == own
    assert regard.mixers.LightningAttention is catalogue.mixers()["LightningAttention"]


@pytest.mark.parametrize("name", NAMES)
def test_facts(name: str) -> None:
    facts = catalogue.mixers()[name].facts
    assert re.match(r"[A-Z]\. .+ \(\d{4}\), .+", facts.paper)
    assert re.fullmatch(r"[A-Z]\w+( et al\.)? \(\d{4}\)", facts.cited)
    assert "=" in facts.formula
    assert facts.time.startswith("O(")
    assert facts.causal


@pytest.mark.parametrize("name", NAMES)
def test_the_state_grows_only_where_its_facts_say_so(name: str) -> None:
    kind = catalogue.mixers()[name]
    mixer = kind(16).eval()
    with torch.no_grad():
        _, short = mixer(torch.randn(1, 20, 16))
        _, long = mixer(torch.randn(1, 140, 16))
    assert (long.bytes > short.bytes) == ("N" in kind.facts.state)


def operations(mixer: Mixer, tokens: int) -> int:
    """Those of the products of matrices in a forward pass, counted and not timed."""
    plain = sdpa_kernel(SDPBackend.MATH)  # a fused operator of the CPU's would not be counted
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, tokens, mixer.dim))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", NAMES)
def test_operations_grow_as_the_formula_of_time_says(name: str) -> None:
    mixer = catalogue.mixers()[name](8).eval().requires_grad_(False)
    exponent = math.log2(operations(mixer, 512) / operations(mixer, 256))
    assert exponent > 1.9 if "N²" in mixer.facts.time else exponent < 1.05


def test_every_mixer_has_a_measured_exponent() -> None:
    """Which one it is is the machine's to say, and `bench.scaling --save` to keep."""
    exponents = catalogue.exponents()
    assert set(exponents) == set(NAMES)
    assert all(0 < exponent < 3 for exponent in exponents.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str) -> None:
    names: dict[str, object] = {}
    exec(catalogue.example(catalogue.mixers()[name]), names)
    assert name in names
    assert len(names) > 2


def test_names_are_found_in_any_writing() -> None:
    for text in ("LightNet", "lightnet", "light-net", "Light net", "LIGHT_NET"):
        assert catalogue.mixer_named(text).__name__ == "LightNet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lightnett", "there is no mixer 'lightnett'; did you mean LightNet?"),
        ("mamba", "there is no mixer 'mamba'; did you mean GatedDeltaRule or SelectiveSSM?"),
        ("xyz", "there is no mixer 'xyz'; known are AdaptiveFilterAttention, Based, CHELA, "),
        ("", "there is no mixer ''; known are AdaptiveFilterAttention"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        catalogue.mixer_named(name)
    result = runner.invoke(app, ["mixers", name])
    assert result.exit_code == 1
    assert message in result.output


def test_the_command_lists_all() -> None:
    result = runner.invoke(app, ["mixers"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    shown = {name: next(n for n, line in enumerate(lines) if line.split()[:1] == [name]) for name in NAMES}
    first, second = (lines[shown["DeltaRule"] + more] for more in (0, 1))
    assert first.split(maxsplit=2) == ["DeltaRule", "causal", "Yang et al. (2024)"]
    facts, exponent = catalogue.mixers()["DeltaRule"].facts, catalogue.exponents()["DeltaRule"]
    assert " ".join(second.split()) == f"{facts.time} N^{exponent:.2f} {facts.state}"
    assert "causal, bidirectional, cross exact Vaswani et al. (2017)" in " ".join(
        lines[shown["SoftmaxAttention"]].split()
    )


def test_the_command_shows_one() -> None:
    result = runner.invoke(app, ["mixers", "deltarule"])
    assert result.exit_code == 0
    assert "S_i = (I − β_i k_i k_iᵀ) S_{i−1} + β_i k_i v_iᵀ" in result.output
    assert "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" in result.output
    assert f"measured N^{catalogue.exponents()['DeltaRule']:.2f}" in result.output
    assert "N tokens, D width, H heads" in result.output
    assert "from regard.mixers import DeltaRule\nimport torch\nmixer, x = DeltaRule(32, heads=4)" in result.output
