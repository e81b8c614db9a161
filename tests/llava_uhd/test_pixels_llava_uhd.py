"""Ways of images into the processor, threads, and the paths that are faster than PIL and float32."""

import io
import os
import random
import resource
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_family import (
    LlavaMoleImageProcessorPil,
    LlavaUhdConfig,
    LlavaUhdImageProcessorPil,
    MoeLlavaConfig,
    MoeLlavaImageProcessorPil,
    plan_slices,
)
from llava_family.llava_uhd.modeling_llava_uhd import normalize_grey_levels
from llava_family.llava_uhd.pixels_llava_uhd import (
    map_in_threads,
    open_image,
    resize_image,
    upright,
)

from .conftest import ROOT
from .tiny import tiny_model, tiny_processor


RAW = {"do_rescale": False, "do_normalize": False}
ROCKET = ROOT / "examples" / "images" / "rocket.jpg"


@pytest.fixture
def image_processor():
    return LlavaUhdImageProcessorPil(base_size=56)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def noise(width=90, height=60, seed=0, channels=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def smooth(width, height):
    """A picture that survives JPEG and drafts: a gradient with one shape in it."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((width // 5, height // 5, width // 2, height // 2), fill=(200, 40, 40))
    return image


def encoded(image, format="png", orientation=None, **kwargs):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif, **kwargs)
    return buffer.getvalue()


def pixels(processor, images, **kwargs):
    return processor(images, return_tensors="np", **kwargs)["pixel_values"]


class TestWaysIn:
    @pytest.fixture
    def files(self, tmp_path):
        data = [encoded(noise(90 + 10 * seed, 60, seed), orientation=6 if seed else None) for seed in range(3)]
        paths = [tmp_path / f"{index}.png" for index in range(3)]
        for path, content in zip(paths, data, strict=True):
            path.write_bytes(content)
        return paths, data

    def test_paths_and_bytes_equal_opened_images(self, image_processor, files):
        paths, data = files
        opened = [upright(Image.open(path)) for path in paths]
        assert opened[1].size == (60, 100)
        expected = [pixels(image_processor, image) for image in opened]
        together = np.concatenate(expected)
        for index in range(3):
            for image in (paths[index], str(paths[index]), data[index], bytearray(data[index])):
                np.testing.assert_array_equal(pixels(image_processor, image), expected[index])
        mixed = [opened[0], str(paths[1]), data[2]]
        for images in (paths, data, tuple(map(str, paths)), mixed, [[paths[0]], [data[1], paths[2]]]):
            np.testing.assert_array_equal(pixels(image_processor, images), together)

    @pytest.mark.parametrize("processor_class", [MoeLlavaImageProcessorPil, LlavaMoleImageProcessorPil])
    def test_other_families_take_them_too(self, processor_class, files):
        paths, data = files
        opened = [Image.open(path) for path in paths]
        np.testing.assert_array_equal(
            pixels(processor_class(), [paths[0], *data[1:]]), pixels(processor_class(), opened)
        )

    def test_with_a_prompt(self, processor, files):
        paths, data = files
        small = tiny_processor(processor)
        text = ["<image> a", "<image><image> b"]
        arguments = {"text": text, "padding": True, "return_tensors": "np"}
        expected = small(images=[Image.open(path) for path in paths], **arguments)
        actual = small(images=[[paths[0]], [str(paths[1]), data[2]]], **arguments)
        assert all(np.array_equal(actual[name], expected[name]) for name in expected)

    def test_transparency_of_files_is_that_of_opened_images(self, image_processor):
        image = noise(channels=4)
        np.testing.assert_array_equal(pixels(image_processor, encoded(image)), pixels(image_processor, image))

    @pytest.mark.parametrize("bad", ["missing.png", b"", b"no image", "path"])
    def test_what_cannot_be_read_is_named(self, image_processor, processor, files, tmp_path, bad):
        bad = tmp_path / "missing.png" if bad == "path" else bad
        name = "missing.png" if not isinstance(bad, bytes) else f"{len(bad)} bytes"
        for call in (image_processor, lambda images: tiny_processor(processor)(images=images, text="<image>" * 3)):
            with pytest.raises(ValueError, match=rf"Image 2 \(.*{name}.*\) cannot be read"):
                call([[files[0][0]], [files[1][1], bad]])

    def test_truncated_bytes_are_named(self, image_processor, files):
        with pytest.raises(ValueError, match="Image 1 of 2 cannot be processed: .*truncated"):
            image_processor([files[1][0], files[1][1][:3000]])

    def test_more_files_than_may_be_open(self, image_processor, files):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            images = image_processor.fetch_images([files[0][0]] * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(images) == 100 and images[99].size == (90, 60)


class TestThreads:
    def test_as_many_as_torch_may_use(self, threads):
        threads(2)
        barrier = threading.Barrier(2)
        map_in_threads(lambda _: barrier.wait(timeout=20), range(4))
        threads(1)
        assert map_in_threads(lambda _: threading.get_ident(), range(4)) == [threading.get_ident()] * 4

    def test_results_are_in_order_and_the_first_error_is_raised(self, threads):
        threads(4)
        events = [threading.Event() for _ in range(4)]

        def last_first(index):
            if index < 3:
                assert events[index + 1].wait(timeout=20)
            events[index].set()
            if index % 2:
                raise ValueError(f"item {index}")
            return index

        with pytest.raises(ValueError, match="item 1"):
            map_in_threads(last_first, range(4))
        assert map_in_threads(lambda index: index**2, range(50)) == [index**2 for index in range(50)]

    @pytest.mark.parametrize("settings", [{}, {"pre_resize_longest_edge": 100}, {"resample_backend": "torch"}])
    def test_pixels_do_not_depend_on_them(self, image_processor, threads, settings):
        images = [noise(*size, seed) for seed, size in enumerate([(200, 90), (50, 50), (90, 300), (64, 70)])]
        threads(1)
        expected = pixels(image_processor, images, **settings)
        square = pixels(MoeLlavaImageProcessorPil(), images)
        threads(4)
        for _ in range(5):
            np.testing.assert_array_equal(pixels(image_processor, images, **settings), expected)
        np.testing.assert_array_equal(pixels(MoeLlavaImageProcessorPil(), images), square)

    def test_errors_name_the_image(self, image_processor, threads):
        threads(4)
        bad = np.full((8, 8, 3), -1.0)
        for _ in range(5):
            with pytest.raises(ValueError, match="Image 2 of 6"):
                image_processor([noise(), noise(), bad, noise(), bad * 2, noise()])

    def test_an_image_that_occurs_again_is_decoded_once(self, image_processor, threads, monkeypatch):
        threads(4)
        decoded, original = [], LlavaUhdImageProcessorPil.process_image
        monkeypatch.setattr(
            LlavaUhdImageProcessorPil,
            "process_image",
            lambda self, image, **kwargs: (decoded.append(image), original(self, image, **kwargs))[1],
        )
        image, other = (Image.open(io.BytesIO(encoded(noise(300, 200, seed)))) for seed in range(2))
        actual = pixels(image_processor, [image, other, image, image])
        assert sorted(map(id, decoded)) == sorted([id(image), id(other)])
        expected = [pixels(image_processor, noise(300, 200, seed)) for seed in (0, 1, 0, 0)]
        np.testing.assert_array_equal(actual, np.concatenate(expected))


class TestGreyLevels:
    @pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5, 0.0123456789])
    def test_normalised_bits_are_those_of_transformers(self, image_processor, factor):
        image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (7, 7, 3)))
        settings = {"do_resize": False, "rescale_factor": factor}
        actual = pixels(image_processor, image, **settings).reshape(8, 8, 3, 14, 14)
        expected = normalize(rescale(np.asarray(image), factor), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        np.testing.assert_array_equal(actual.transpose(0, 3, 1, 4, 2).reshape(112, 112, 3), expected)

    def test_they_are_uint8_where_nothing_is_done_to_them(self, image_processor):
        raw = pixels(image_processor, noise(), **RAW)
        assert raw.dtype == np.uint8
        assert pixels(MoeLlavaImageProcessorPil(), noise(), **RAW).dtype == np.uint8
        unit = np.asarray(noise()) / 255
        both = pixels(image_processor, [noise(), unit], **RAW)
        assert both.dtype == np.float32
        np.testing.assert_array_equal(both[: len(raw)], raw)
        np.testing.assert_allclose(both[len(raw) :] * 255, raw, atol=1e-4)

    @pytest.mark.parametrize("resampler_type", ["spatial", "perceiver"])
    def test_models_normalise_them(self, processor, resampler_type):
        model, small = tiny_model(resampler_type=resampler_type), tiny_processor(processor)
        arguments = {"images": [noise(200, 90), noise(40, 50)], "text": "<image> and <image>", "return_tensors": "pt"}
        usual, raw = small(**arguments), small(**arguments, **RAW)
        assert raw["pixel_values"].dtype == torch.uint8
        with torch.no_grad():
            torch.testing.assert_close(model(**raw).logits, model(**usual).logits, atol=1e-5, rtol=0)

    def test_config_says_by_what(self, processor):
        model, small = tiny_model(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]), tiny_processor(processor)
        arguments = {"images": noise(), "text": "<image>", "return_tensors": "pt"}
        usual = small(**arguments, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        with torch.no_grad():
            torch.testing.assert_close(model(**small(**arguments, **RAW)).logits, model(**usual).logits)

    @pytest.mark.parametrize(
        ("tower", "mean"), [("clip_vision_model", OPENAI_CLIP_MEAN), ("siglip_vision_model", [0.5] * 3)]
    )
    def test_square_views(self, tower, mean):
        config = MoeLlavaConfig(vision_config={"model_type": tower})
        processor = MoeLlavaImageProcessorPil(image_mean=mean, image_std=config.image_std)
        actual = normalize_grey_levels(processor(noise(), return_tensors="pt", **RAW)["pixel_values"], config)
        torch.testing.assert_close(actual, processor(noise(), return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0)
        assert MoeLlavaConfig(image_std=[1.0]).image_std == [1.0]

    def test_one_number_is_that_of_all_channels(self):
        levels = torch.arange(12, dtype=torch.uint8).view(1, 12)
        one, three = (
            normalize_grey_levels(levels, LlavaUhdConfig(image_mean=mean, image_std=std))
            for mean, std in ((0.5, 0.25), ([0.5] * 3, [0.25] * 3))
        )
        torch.testing.assert_close(one, three, rtol=0, atol=0)
        torch.testing.assert_close(one, (levels / 255 - 0.5) / 0.25)


class TestTorchResize:
    @pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
    def test_within_two_grey_levels_of_pil(self, resample):
        """Of noise, the worst case, for all relations of sizes: Pillow orders its passes by them."""
        rng, image = random.Random(0), noise(400, 400)
        for _ in range(150):
            width, height, *size = (rng.randint(8, 400) for _ in range(4))
            source = image.crop((0, 0, width, height))
            actual = resize_image(np.array(source), tuple(size), resample)
            expected = np.asarray(resize_image(source, tuple(size), resample))
            assert np.abs(actual.astype(int) - expected).max() <= 2, (width, height, size)

    @pytest.mark.parametrize("size", [(640, 427), (672, 1088), (1344, 2016), (90, 60)])
    def test_slices(self, size):
        image = Image.open(ROCKET).resize(size)
        fast = LlavaUhdImageProcessorPil(resample_backend="torch")
        for settings in ({}, {"pre_resize_longest_edge": 500}):
            expected = LlavaUhdImageProcessorPil()(image, return_tensors="np", **RAW, **settings)
            actual = fast(image, return_tensors="np", **RAW, **settings)
            np.testing.assert_array_equal(actual["image_grids"], expected["image_grids"])
            difference = np.abs(actual["pixel_values"].astype(int) - expected["pixel_values"])
            assert difference.max() <= (2 if not settings else 4) and difference.mean() < 0.05

    @pytest.mark.parametrize("channels", [1, 3])
    def test_square_views(self, channels):
        settings = {"do_convert_rgb": False, "background_color": [100] * channels, **RAW}
        expected = pixels(MoeLlavaImageProcessorPil(), noise(300, 500, channels=channels), **settings)
        actual = pixels(
            MoeLlavaImageProcessorPil(resample_backend="torch"), noise(300, 500, channels=channels), **settings
        )
        assert 0 < np.abs(actual.astype(int) - expected).max() <= 2

    def test_opacity_is_left_to_pil(self, image_processor):
        image, settings = noise(channels=4), {"do_convert_rgb": False, **RAW}
        actual = pixels(image_processor, image, resample_backend="torch", **settings)
        np.testing.assert_array_equal(actual, pixels(image_processor, image, **settings))

    def test_what_it_does_not_know(self, image_processor):
        with pytest.raises(ValueError, match="bicubic or bilinear.*LANCZOS"):
            image_processor(noise(), resample_backend="torch", resample=Image.Resampling.LANCZOS)
        with pytest.raises(ValueError, match="`resample_backend` must be.*'numpy'"):
            LlavaUhdImageProcessorPil(resample_backend="numpy")(noise())

    def test_save_and_load(self, tmp_path):
        LlavaUhdImageProcessorPil(resample_backend="torch", use_jpeg_draft=True).save_pretrained(tmp_path)
        loaded = LlavaUhdImageProcessorPil.from_pretrained(tmp_path)
        assert (loaded.resample_backend, loaded.use_jpeg_draft) == ("torch", True)


class TestJpegDraft:
    @pytest.fixture
    def decoded_sizes(self, monkeypatch):
        """Sizes of the images that are decoded, as they lie in their files."""
        sizes = []

        def record(image):
            image.load()
            sizes.append(image.size)
            return upright(image)

        monkeypatch.setattr("llava_family.llava_uhd.image_processing_pil_llava_uhd.upright", record)
        return sizes

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    @pytest.mark.parametrize(
        ("settings", "decoded"),
        [({}, (251, 101)), ({"pre_resize_longest_edge": 300}, (501, 201)), ({"max_slices": 1}, (126, 51))],
    )
    def test_slices_are_those_of_the_original_size(
        self, image_processor, decoded_sizes, orientation, settings, decoded
    ):
        data = encoded(smooth(1001, 401), "jpeg", orientation, quality=95)
        expected = image_processor(data, return_tensors="np", **RAW, **settings)
        actual = image_processor(data, return_tensors="np", use_jpeg_draft=True, **RAW, **settings)
        np.testing.assert_array_equal(actual["image_grids"], expected["image_grids"])
        assert np.abs(actual["pixel_values"].astype(int) - expected["pixel_values"]).mean() < 2
        assert decoded_sizes == [(1001, 401), decoded]

    @pytest.mark.parametrize("size", [(391, 1017), (1011, 287), (225, 1131), (1074, 912)])
    def test_slices_are_not_those_of_the_draft_s_own_size(self, image_processor, decoded_sizes, size, monkeypatch):
        resized_to = []
        monkeypatch.setattr(
            "llava_family.llava_uhd.image_processing_pil_llava_uhd.resize_image",
            lambda image, size, resample: (resized_to.append(size), resize_image(image, size, resample))[1],
        )
        image_processor(encoded(Image.new("RGB", size), "jpeg"), use_jpeg_draft=True)
        plan = plan_slices(*size, base_size=56)
        assert plan_slices(*decoded_sizes[0], base_size=56) != plan
        assert sorted(resized_to) == sorted([plan.refined_size, plan.overview_size])

    def test_it_is_the_smallest_that_no_view_is_larger_than(self, image_processor, decoded_sizes):
        rng, scales = random.Random(0), set()
        for _ in range(60):
            width, height, orientation = rng.randint(60, 1500), rng.randint(60, 1500), rng.choice([1, 6])
            image_processor(encoded(Image.new("RGB", (width, height)), "jpeg", orientation), use_jpeg_draft=True)
            decoded = decoded_sizes.pop()
            scale = round(width / decoded[0])
            assert decoded == (-(-width // scale), -(-height // scale))
            size = (width, height) if orientation == 1 else (height, width)
            plan = plan_slices(*size, base_size=56)
            views = [view for view in (plan.refined_size, plan.overview_size) if view]
            room = min(side // least for view in views for side, least in zip(size, view, strict=True))
            assert scale == max(scale for scale in (1, 2, 4, 8) if scale <= max(room, 1))
            scales.add(scale)
        assert scales == {1, 2, 4, 8}

    def test_an_opened_image_is_left_as_it_is(self, image_processor, tmp_path, decoded_sizes):
        path = tmp_path / "photo.jpg"
        path.write_bytes(encoded(smooth(800, 600), "jpeg"))
        image = Image.open(path)
        draft = pixels(image_processor, image, use_jpeg_draft=True)
        assert image.size == (800, 600)
        np.testing.assert_array_equal(pixels(image_processor, path, use_jpeg_draft=True), draft)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path)))
        # Now that it is loaded, there is nothing left to be saved.
        pixels(image_processor, image, use_jpeg_draft=True)
        assert decoded_sizes == [(200, 150), (200, 150), (800, 600)]

    def test_other_images_are_exact(self, image_processor):
        image = noise(400, 300)
        small = encoded(noise(70, 60), "jpeg")
        for same in (image, np.asarray(image), encoded(image, "png"), small):
            np.testing.assert_array_equal(
                pixels(image_processor, same, use_jpeg_draft=True), pixels(image_processor, same)
            )

    def test_off_by_default(self, image_processor, decoded_sizes):
        image_processor(encoded(smooth(800, 600), "jpeg"))
        assert decoded_sizes == [(800, 600)]

    def test_without_resizing_nothing_is_scaled(self, image_processor, decoded_sizes):
        data = encoded(smooth(1400, 1400), "jpeg")
        image_processor(data, do_resize=False, use_jpeg_draft=True)
        MoeLlavaImageProcessorPil(do_resize=False)(data, use_jpeg_draft=True)
        assert decoded_sizes == [(1400, 1400)] * 2

    @pytest.mark.parametrize(("do_pad", "decoded"), [(True, (88, 44)), (False, (175, 88))])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_square_views(self, decoded_sizes, do_pad, decoded, orientation):
        processor = MoeLlavaImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=do_pad, base_size=56
        )
        data = encoded(smooth(700, 350), "jpeg", orientation, quality=95)
        difference = pixels(processor, data, use_jpeg_draft=True, **RAW).astype(int) - pixels(processor, data, **RAW)
        assert np.abs(difference).mean() < 3
        assert decoded_sizes == [decoded, (700, 350)]

    def test_square_views_are_of_the_original_s_shape(self, decoded_sizes):
        processor = MoeLlavaImageProcessorPil(size={"shortest_edge": 56}, do_pad=False, do_center_crop=False)
        data = encoded(smooth(1035, 436), "jpeg")
        assert pixels(processor, data, use_jpeg_draft=True).shape == (1, 3, 56, 132)
        assert decoded_sizes == [(259, 109)]

    def test_slices_of_other_families(self, image_processor, decoded_sizes):
        data = encoded(smooth(1011, 287), "jpeg")
        slices = MoeLlavaImageProcessorPil(vision_encoding="slices", base_size=56, size={"shortest_edge": 14})
        np.testing.assert_array_equal(
            pixels(slices, data, use_jpeg_draft=True), pixels(image_processor, data, use_jpeg_draft=True)
        )
        assert decoded_sizes == [(253, 72)] * 2


def test_open_image_leaves_the_rest_to_transformers():
    image = noise()
    for other in (image, "https://example.com/image.png", "iVBORw0KGgo=", np.zeros((2, 2, 3))):
        assert open_image(other) is other
