# Copyright 2026 The llava-family authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Adaptive slicing of LLaVA-UHD (arXiv 2403.11703, section 3.2): which views an image of a given size is cut into.

`plan_slices` is pure arithmetic on the image size. It is the only code of the package that knows grids and token
counts: image processors, processors, models, `explain` and the benchmarks all call it, so they cannot disagree.

Source: the paper's section 3.2, in the released code's arithmetic.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class SlicePlan:
    """How one image is cut into views. All sizes are `(width, height)` in pixels, multiples of `patch_size`.

    Attributes:
        columns (`int`): Slices per row; 0 where the image is not sliced.
        rows (`int`): Rows of slices; 0 where the image is not sliced.
        slice_size (`tuple[int, int]`, *optional*): `(width, height)` of every slice in pixels, `None` where the image
            is not sliced.
        overview_size (`tuple[int, int]`): `(width, height)` in pixels of the view that shows the whole image.
        patch_size (`int`): Side of a vision encoder patch in pixels.
    """

    columns: int
    rows: int
    slice_size: tuple[int, int] | None
    overview_size: tuple[int, int]
    patch_size: int = 14

    @property
    def num_slices(self) -> int:
        """Slices of the image, without the overview; 0 where it is not sliced."""
        return self.columns * self.rows

    @property
    def num_views(self) -> int:
        """Views that the vision encoder sees: the slices, and always the overview."""
        return self.num_slices + 1

    @property
    def refined_size(self) -> tuple[int, int] | None:
        """`(width, height)` in pixels that the whole image is resized to before it is cut, `None` where it is not
        sliced.
        """
        if self.slice_size is None:
            return None
        return self.slice_size[0] * self.columns, self.slice_size[1] * self.rows

    @property
    def view_grids(self) -> list[tuple[int, int]]:
        """`(rows, columns)` of patches of every view in encoding order: slices row by row, then the overview."""
        slices = [] if self.slice_size is None else [self.slice_size] * self.num_slices
        sizes = [*slices, self.overview_size]
        return [(height // self.patch_size, width // self.patch_size) for width, height in sizes]

    @property
    def num_patches(self) -> int:
        """Vision encoder patches of all views together."""
        return sum(rows * columns for rows, columns in self.view_grids)

    def slice_boxes(self) -> Iterator[tuple[int, int, int, int]]:
        """Places of all slices in the refined image, row by row.

        Yields:
            `tuple[int, int, int, int]`: `(left, top, right, bottom)` of a slice in pixels.
        """
        if self.slice_size is None:
            return
        width, height = self.slice_size
        for row in range(self.rows):
            for column in range(self.columns):
                yield column * width, row * height, (column + 1) * width, (row + 1) * height

    def num_features(self, queries: int) -> int:
        """Counts the features that the resampler makes of all views.

        Args:
            queries (`int`): Features of one view.

        Returns:
            `int`: Image features: `queries` for every view.
        """
        return self.num_views * queries

    def num_tokens(self, queries: int) -> int:
        """Counts what the image takes in the text model's sequence (paper, section 3.4).

        Args:
            queries (`int`): Features of one view.

        Returns:
            `int`: Positions: the features, and one separator behind every slice.
        """
        return self.num_features(queries) + self.num_slices


def plan_slices(
    width: int, height: int, *, base_size: int = 336, patch_size: int = 14, max_slices: int = 7
) -> SlicePlan:
    """Plans the views of a `width` x `height` image.

    An image of more than one `base_size` square is cut into the grid whose shape is closest to its own, among the
    grids of about `area / base_size**2` slices (section 3.2, equations 1-3 of the paper). Every view has about
    `base_size**2` pixels. `max_slices=1` never slices.

    Args:
        width (`int`): Width of the image in pixels.
        height (`int`): Height of the image in pixels.
        base_size (`int`, *optional*, defaults to 336): Side of the square that the vision encoder was trained on, in
            pixels.
        patch_size (`int`, *optional*, defaults to 14): Side of a vision encoder patch in pixels.
        max_slices (`int`, *optional*, defaults to 7): Upper limit for the number of slices (the paper says 6, the
            released code and weights use 7).

    Returns:
        `SlicePlan`: Grid, sizes and counts of the views.

    Raises:
        ValueError: if a size or limit is not a positive integer, or `base_size` is smaller than `patch_size`.
    """
    for name, value in (
        ("width", width),
        ("height", height),
        ("base_size", base_size),
        ("patch_size", patch_size),
        ("max_slices", max_slices),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {value!r} (image size {width}x{height}).")
    if base_size < patch_size:
        raise ValueError(f"`base_size` ({base_size}) must be at least `patch_size` ({patch_size}).")

    ideal_count = min(math.ceil(width * height / base_size**2), max_slices)
    if ideal_count <= 1:
        overview_size = _fit_area(width, height, base_size, patch_size, upscale=True)
        return SlicePlan(0, 0, None, overview_size, patch_size)

    columns, rows = _best_grid(width, height, ideal_count, max_slices)
    cell_width = _floor_to_multiple(width, columns) / columns
    cell_height = _floor_to_multiple(height, rows) / rows
    return SlicePlan(
        columns,
        rows,
        slice_size=_fit_area(cell_width, cell_height, base_size, patch_size, upscale=True),
        overview_size=_fit_area(width, height, base_size, patch_size, upscale=False),
        patch_size=patch_size,
    )


def pre_resize_size(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """Size of an image whose longer side is scaled, up or down, to `longest_edge` (the original's evaluation does so).

    The shorter side is truncated as in the original, which can cost a pixel: 823x823 becomes 1023x1024.

    Args:
        width (`int`): Width of the image in pixels.
        height (`int`): Height of the image in pixels.
        longest_edge (`int`): What the longer side becomes, in pixels.

    Returns:
        `tuple[int, int]`: `(width, height)` in pixels.

    Raises:
        ValueError: if the image is so thin that its shorter side would vanish.
    """
    ratio = longest_edge / width if width > height else longest_edge / height
    new_width = longest_edge if width > height else int(width * ratio)
    new_height = int(height * ratio) if width > height else longest_edge
    if new_width < 1 or new_height < 1:
        raise ValueError(
            f"An image of {width}x{height} pixels is too thin for `pre_resize_longest_edge={longest_edge}`: its "
            "shorter side would become 0 pixels. Leave `pre_resize_longest_edge` unset for such images."
        )
    return new_width, new_height


def _best_grid(width: int, height: int, ideal_count: int, max_slices: int) -> tuple[int, int]:
    # The released weights were trained with exactly these doubles: |ln(2/3)| and |ln(3/2)| differ in their last bit,
    # which is why a large square is cut 3x2 and not 2x3. Rational or float32 arithmetic would break such ties
    # elsewhere.
    log_aspect_ratio = math.log(width / height)
    best_error, best = math.inf, (1, ideal_count)
    for count in (ideal_count - 1, ideal_count, ideal_count + 1):
        if count == 1 or count > max_slices:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            error = abs(log_aspect_ratio - math.log(columns / rows))
            if error < best_error:
                best_error, best = error, (columns, rows)
    return best


def _fit_area(width: float, height: float, base_size: int, patch_size: int, *, upscale: bool) -> tuple[int, int]:
    """The multiples of `patch_size` below the size of about `base_size**2` pixels with the same aspect ratio."""
    if upscale or width * height > base_size**2:
        aspect_ratio = width / height
        height = int(base_size / math.sqrt(aspect_ratio))
        width = int(height * aspect_ratio)  # from the truncated height, as in the original
    return _floor_to_multiple(width, patch_size), _floor_to_multiple(height, patch_size)


def _floor_to_multiple(value: float, multiple: int) -> int:
    return max(math.floor(value / multiple) * multiple, multiple)


__all__ = ["SlicePlan", "plan_slices", "pre_resize_size"]
