"""`torch.export` of what sees images: the exported program computes what the model does.

One picture's views have sizes that depend on the picture, and a program has one set of them: LLaVA-UHD is exported for
given grids. Square views are all equal, so any number of images runs in one program.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModelForImageTextToText
from transformers.testing_utils import slow

from llava_family.llava_uhd.modeling_llava_uhd import region_sampling_weights, view_grids_of


CHECKPOINTS = Path(__file__).parents[1] / "examples" / "miniature" / "checkpoints"


def load(name):
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()


class Views(nn.Module):
    """LLaVA-UHD's tower and resampler, for views of `view_grids`."""

    def __init__(self, model, view_grids):
        super().__init__()
        self.vision_tower, self.resampler = model.model.vision_tower, model.model.resampler
        self.view_grids = view_grids

    def forward(self, pixel_values):
        features = self.vision_tower(pixel_values, self.view_grids, return_dict=True).last_hidden_state
        return self.resampler(features, self.view_grids)


class Squares(nn.Module):
    """Tower and projector of square views."""

    def __init__(self, model):
        super().__init__()
        self.vision_tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.layer = model.config.vision_feature_layer

    def forward(self, pixel_values):
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        return self.projector(outputs.hidden_states[self.layer][:, 1:])


def assert_program_equals_model(grid, strict):
    model = load("llava-uhd-miniature")
    image_grids = torch.tensor([grid])
    (view_grids,) = view_grids_of(image_grids)
    patch_size = model.config.vision_config.patch_size
    shape = (2, sum(rows * columns for rows, columns in view_grids), 3 * patch_size**2)
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = [model.get_image_features(pixels, image_grids).pooler_output[0] for pixels in pixel_values]
    program = torch.export.export(Views(model, view_grids), (pixel_values[0],), strict=strict).module()
    for pixels, features in zip(pixel_values, expected, strict=True):
        torch.testing.assert_close(program(pixels).flatten(0, 1), features, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [[[2, 1], [4, 3], [3, 5]], [[0, 0], [0, 0], [4, 4]]], ids=["slices", "overview"])
@torch.no_grad()
def test_views(grid):
    assert_program_equals_model(grid, strict=False)


@slow
@torch.no_grad()
def test_views_strictly():
    # As from a new process, where no grid has been seen
    region_sampling_weights.cache_clear()
    assert_program_equals_model([[2, 1], [4, 3], [3, 5]], strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe-llava-miniature", "llava-mole-miniature"])
@torch.no_grad()
def test_squares_of_any_number(name):
    model = load(name)
    size = model.config.vision_config.image_size
    pixel_values = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    dynamic = {"pixel_values": {0: Dim("images", max=64)}}
    program = torch.export.export(Squares(model), (pixel_values[:2],), dynamic_shapes=dynamic).module()
    for num_images in (1, 2, 5):
        outputs = model.get_image_features(pixel_values[:num_images])
        expected = torch.stack(outputs.pooler_output)
        if model.config.model_type == "llava_mole":
            expected = expected[:, 1:-1]  # between the embeddings of an image's start and end
        torch.testing.assert_close(program(pixel_values[:num_images]), expected, rtol=1e-4, atol=1e-5)
