"""Images: the patches of an encoder stand where they are on the picture."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import fromarray, open
from torch import Tensor

from regard.inputs import Picture, read_image
from regard.inputs.image import grid_of
from regard.look import Look, look
from tests.inputs.models import PATCH, clip_vision, dinov2, image, siglip_vision, swin, vit

# What stands before the patches, and the grid of these.
ENCODERS = {
    vit: (("[CLS]",), (4, 4)),
    clip_vision: (("[CLS]",), (4, 4)),
    dinov2: (("[CLS]", "[REG1]", "[REG2]", "[REG3]", "[REG4]"), (3, 5)),
    siglip_vision: ((), (4, 4)),
}


def attentions(model: Any, **inputs: Tensor) -> list[np.ndarray]:
    """The matrices of each layer as the model stores them, (heads, queries, keys)."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [matrix[0].double().numpy() for matrix in matrices]


@pytest.fixture(params=ENCODERS, ids=lambda encoder: encoder.__name__)
def seen(request: pytest.FixtureRequest) -> tuple[Any, Any, Look]:
    model, processor = request.param()
    return request.param, (model, processor), look(model, processor, image=image())


def test_tokens_are_named_by_what_stands_before_the_patches_and_by_the_grid(seen: tuple[Any, Any, Look]) -> None:
    first, (rows, columns) = ENCODERS[seen[0]]
    names = seen[2].parts[0].dataset.key_token[0].values.tolist()
    assert names == [*first, *(f"row {row}, column {column}" for row in range(rows) for column in range(columns))]


def test_statistics_are_those_of_the_stored_matrices(seen: tuple[Any, Any, Look]) -> None:
    first, (rows, columns) = ENCODERS[seen[0]]
    model, processor = seen[1]
    data = seen[2].parts[0].dataset.isel(batch=0)
    stored = attentions(model, **processor(images=image(), return_tensors="pt"))
    places = np.stack(np.meshgrid(range(rows), range(columns), indexing="ij"), -1).reshape(-1, 2)
    squares = ((places[:, None] - places[None]) ** 2).sum(-1)
    patches = slice(len(first), None)
    for layer, matrix in enumerate(stored):
        between = matrix[:, patches, patches]
        expected = np.sqrt((between * squares).sum(-1) / between.sum(-1))
        np.testing.assert_allclose(data.received[layer], matrix.sum(1), rtol=1e-4)
        np.testing.assert_allclose(data.grid_distance[layer, :, patches], expected, rtol=1e-3, atol=1e-3)
        right = data["at"][layer].sel(target="right").values[:, patches].reshape(-1, rows, columns)
        below = data["at"][layer].sel(target="below").values[:, patches].reshape(-1, rows, columns)
        grid = between.reshape(-1, rows, columns, rows, columns)
        for row, column in np.ndindex(rows, columns - 1):
            np.testing.assert_allclose(right[:, row, column], grid[:, row, column, row, column + 1], atol=1e-5)
        for row, column in np.ndindex(rows - 1, columns):
            np.testing.assert_allclose(below[:, row, column], grid[:, row, column, row + 1, column], atol=1e-5)
        assert np.isnan(right[:, :, -1]).all()
        assert np.isnan(below[:, -1]).all()
        if first:
            sink = data.mass[layer].sel(segment="sink")
            np.testing.assert_allclose(sink, matrix[..., : len(first)].sum(-1), atol=1e-5)
    assert np.isnan(data.grid_distance[..., : len(first)]).all()
    assert ("mass" in data) == bool(first)


def test_a_head_that_pools_the_patches_is_a_part_of_its_own() -> None:
    parts = look(*siglip_vision(), image=image()).parts
    assert [part.name for part in parts] == ["Image", "Image: pooling"]
    pooling = parts[1].dataset
    assert pooling.query_token.values.tolist() == [["[probe]"]]
    np.testing.assert_allclose(pooling.received.sum("key"), 1, atol=1e-5)
    assert "grid_distance" not in pooling


def test_the_picture_is_what_the_model_saw() -> None:
    """A wide picture is cut in the middle, and normalized; the page shows it cut and in its own colours."""
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = [200, 100, 50]
    wide[:8, 16:32] = [10, 20, 240]
    model, processor = clip_vision()
    (part,) = read_image(model, processor, fromarray(wide)).parts
    assert part.keys.picture is not None
    shown = np.asarray(open(io.BytesIO(part.keys.picture.png)))
    assert shown.shape == (16, 16, 3)
    assert abs(shown[2, 8].astype(int) - [10, 20, 240]).max() <= 2
    assert abs(shown[13, 8].astype(int) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize(("row", "column"), [(0, 4), (2, 1), (1, 3)])
def test_a_patch_that_all_look_at_stands_where_it_is_bright(row: int, column: int) -> None:
    model, processor = dinov2()
    drawn_by_light(model)
    picture = np.full((3 * PATCH, 5 * PATCH, 3), 60, np.uint8)
    picture[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 250
    data = look(model, processor, image=fromarray(picture)).dataset
    for layer in range(2):
        most = data.received[layer, 0].mean("head").argmax("key").item()
        assert data.key_token[0].values[most] == f"row {row}, column {column}"


def drawn_by_light(model: Any) -> None:
    """Have every head of DINOv2 look at the lightest patch."""
    embeddings = model.embeddings
    with torch.no_grad():
        for parameter in embeddings.parameters():
            parameter.zero_()
        embeddings.patch_embeddings.projection.weight[0] = 1.0
        for name, module in model.named_modules():
            if name.endswith("attention.attention"):
                for parameter in module.parameters():
                    parameter.zero_()
                module.query.bias[::8] = 2.0
                module.key.weight[::8, 0] = 2.0


def test_a_file_is_held_upright(tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # light above, as the file has it
    exif = fromarray(pixels).getexif()
    exif[0x0112] = 3  # the camera was held upside down
    fromarray(pixels).save(turned, exif=exif, quality=100)
    (part,) = read_image(*vit(), turned).parts
    assert part.keys.picture is not None
    shown = np.asarray(open(io.BytesIO(part.keys.picture.png)))
    assert shown[2].mean() < 50 < 200 < shown[13].mean()


def test_attention_in_windows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"SwinModel cuts the image into 8×8 patches, but no attention call is between"
    ):
        look(*swin(), image=image())


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("a picture")
    with pytest.raises(ValueError, match=r"text\.png is no image that Pillow can read"):
        look(*vit(), image=tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"there is no file .*nothing\.png"):
        look(*vit(), image=tmp_path / "nothing.png")


def test_chosen_layers_alone_are_watched() -> None:
    model, processor = siglip_vision()
    assert look(model, processor, image=image(), layers=[1]).dataset.layer.values.tolist() == [
        "encoder.layers.1.self_attn"
    ]
    with pytest.raises(IndexError, match="layer 7 was chosen, but 3 attention calls were seen"):
        look(model, processor, image=image(), layers=[7])


@pytest.mark.parametrize(
    ("patches", "tokens", "grid"),
    [((4, 6), 24, (4, 6)), ((4, 6), 6, (2, 3)), ((4, 6), 12, None), ((4, 6), 25, None), ((4, 6), 0, None)],
)
def test_the_grid_of_merged_patches(patches: tuple[int, int], tokens: int, grid: tuple[int, int] | None) -> None:
    assert grid_of(patches, tokens) == grid


def test_patches_beside_one_another() -> None:
    picture = Picture(b"", 2, 3, (1, 2, 3, 5, 6, 7))  # with a token between the rows
    assert picture.shifted(0, 1, 8).tolist() == [-1, 2, 3, -1, -1, 6, 7, -1]
    assert picture.shifted(1, -1, 8).tolist() == [-1, -1, 5, 6, -1, -1, -1, -1]
    assert picture.place(6) == (1, 1)
    assert picture.coordinates(8)[4].isnan().all()
    assert picture.coordinates(8)[7].tolist() == [1, 2]
    with pytest.raises(ValueError, match="2×3 patches need as many positions, got 2"):
        Picture(b"", 2, 3, (1, 2))
