"""Lays out transformers' own shared test mixins, of the version that is installed, in `.cache/transformers_suite`.

The mixins come from the source distribution on PyPI and stay in the cache. It has `tests/test_*.py` and nothing below;
what those files import from there is replaced by the stubs here.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pipelines import write_tiny_models


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "transformers_suite"
TINY_MODELS = FOLDER / "tiny_models"
PICTURE = ROOT / "examples" / "images" / "rocket.jpg"

GENERATION = """
class GenerationTesterMixin:
    @property
    def all_generative_model_classes(self):
        return tuple(model_class for model_class in self.all_model_classes if model_class.can_generate())

    def _check_attentions_for_generate(self, *args, **kwargs):
        pass
"""

EXPORT = """
class ExportTesterMixin:
    pass


class ExportGenerateTesterMixin:
    pass
"""

CONFIGURATION = """
config_common_kwargs = {
    "architectures": ["AnyModel"],
    "dtype": "float16",
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
"""

# The tests' picture of the network is a picture of ours.
FETCH = f"""
def url_to_local_path(url, return_url_if_not_found=True):
    return {str(PICTURE)!r} if url.endswith((".png", ".jpg", ".jpeg")) else url
"""

STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": EXPORT,
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": GENERATION,
    "tests/pipelines/__init__.py": "",
    "tests/pipelines/test_pipelines_any_to_any.py": "from pipelines import AnyToAnyPipelineTests",
    "tests/pipelines/test_pipelines_image_text_to_text.py": "from pipelines import ImageTextToTextPipelineTests",
    "tests/pipelines/test_pipelines_text_generation.py": "from pipelines import TextGenerationPipelineTests",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": CONFIGURATION,
    "utils/fetch_hub_objects_for_ci.py": FETCH,
}


def prepare() -> Path:
    """The folder to put on `sys.path`. Raises `OSError` if the source distribution cannot be had."""
    version = importlib.metadata.version("transformers")
    ready = FOLDER / f".ready-{version}"
    if not ready.exists():
        _fetch_tests(version)
    for name, text in STUBS.items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    _link_source()
    write_tiny_models(TINY_MODELS)
    ready.touch()
    return FOLDER


def _fetch_tests(version: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--retries=2", "--no-deps", "--no-binary=:all:"]
        result = subprocess.run(
            [*command, f"--dest={folder}", f"transformers=={version}"], capture_output=True, text=True, check=False
        )
        if result.returncode:
            reason = result.stderr.strip().rpartition("\n")[2]
            raise OSError(f"pip cannot download the source distribution of transformers {version}: {reason}")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            for member in archive:
                _, _, name = member.name.partition("/")
                if name.startswith("tests/") and name.endswith(".py") and member.isfile():
                    path = FOLDER / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.extractfile(member).read())


def _link_source() -> None:
    """The pipeline mixin imports transformers a second time, by its path in a checkout."""
    link = FOLDER / "src"
    installed = Path(importlib.util.find_spec("transformers").origin).parents[1]
    if not link.is_symlink() or link.resolve() != installed:
        link.unlink(missing_ok=True)
        link.symlink_to(installed, target_is_directory=True)


if __name__ == "__main__":
    print(prepare())
