"""The README's Python runs as shown."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_examples_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 14
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "{'layer': 2, 'batch': 1, 'head': 2, 'query': 119, 'target': 2}" in printed
    assert "48213 → 70455" in printed.splitlines()
    assert "[HeadChange(layer='model.layers.2.self_attn', head=2, metric=" in printed
    assert "SnapKV(budget=0.25, window=16, kernel=9): 25." in printed
    assert "48213" in printed.splitlines()
    assert "8193 tokens in 65536 bytes" in printed.splitlines()
    assert "(1, 4, 512, 512)" in printed.splitlines()
    assert "4 True" in printed.splitlines()
    assert Path("seen.nc").exists()
    assert "LlamaForCausalLM" in Path("report.html").read_text(encoding="utf-8")


def test_contributing_example_is_a_statistic() -> None:
    from torch.nn.functional import scaled_dot_product_attention

    import regard

    text = (README.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names: dict[str, type[regard.Statistic]] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    q, k = torch.randn(2, 1, 2, 9, 8)
    near = names["Near"](2)  # type: ignore[call-arg]
    with regard.watch(near, keep_maps=True) as seen:
        scaled_dot_product_attention(q, k, k)
    (maps,) = seen.maps.values()
    band = (torch.arange(9)[:, None] - torch.arange(9)).abs() <= 2
    torch.testing.assert_close(torch.tensor(seen.dataset().near[0].values), (maps[0].dense() * band).sum(-1))


def test_contributing_example_is_a_policy(mini: tuple[Any, Any]) -> None:
    import regard

    text = (README.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    model, _ = mini
    with torch.no_grad(), regard.compress(model, names["LargeValues"](budget=4)) as cache:
        values = model(torch.arange(10, 30)[None]).past_key_values.layers
    assert [layer.groups[0].length for layer in values] == [4] * 4
    assert all(layer.positions[..., -1].all() for layer in cache.report().layers)


def test_contributing_example_is_a_mixer() -> None:
    from tests.mixers.contract import check_mixer

    text = (README.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[2], names)
    mixer = names["Hebbian"](16)
    check_mixer(mixer)
    assert mixer.map(torch.randn(1, 9, 16)).dense().triu(1).abs().max() == 0
