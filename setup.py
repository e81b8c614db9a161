from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


README = Path(__file__).parent / "README.md"
# `llava-family export` writes them into the repositories that it makes.
EXPORTED_FILES = ["LICENSE", *sorted(path.as_posix() for path in Path("model_cards").glob("*.md"))]


class BuildWithExportedFiles(build_py):
    """Puts files of the repository's top into the package; an editable install finds them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in EXPORTED_FILES:
                target = Path(self.build_lib, "llava_family", "hub", file)
                self.mkpath(str(target.parent))
                self.copy_file(file, str(target))

    def get_source_files(self):
        return [*super().get_source_files(), *EXPORTED_FILES]


PLOT = ["matplotlib>=3.8"]
# Not in `dev`: gradio asks for a Pillow below 13, and the goldens' pixels are Pillow 13's, see the Makefile.
DEMO = [*PLOT, "gradio>=6.20"]
# The documentation site, `make docs`
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
# Run the notebooks of `examples` and the demo's page
NOTEBOOKS, BROWSER = ["ipykernel", "nbclient", "nbformat"], ["playwright"]
TRAIN = ["accelerate>=1.1", "peft>=0.21"]
# Of examples/training/trl_sft.py, and for data that is a `datasets.Dataset`
TRL = ["datasets>=4.7", "trl>=1.16"]
# Of `transformers serve`
SERVING = ["accelerate>=1.1", "fastapi>=0.115", "openai>=1.98", "uvicorn>=0.30"]

setup(
    name="llava-family",
    version="0.1.0",
    description="LLaVA-UHD, MoE-LLaVA and LLaVA-MoLE as Hugging Face transformers models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="llava vision-language multimodal high-resolution mixture-of-experts lora transformers pytorch",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"": ["py.typed", "*.jinja"], "llava_family.hub": ["*.md"]},
    cmdclass={"build_py": BuildWithExportedFiles},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        # The loading and output-capturing APIs used here are not stable between minor releases of transformers.
        "transformers>=5.23,<5.24",
        "huggingface_hub>=1.31,<3",
        "numpy>=1.26",
        "pillow>=10.0.1",
        "rich>=13",
        "safetensors>=0.8",
        "tokenizers>=0.23.1,<0.24",
        "typer>=0.15",
        # transformers reads the `tokenizer.model` of an original release with these two.
        "protobuf",
        "sentencepiece>=0.2",
    ],
    extras_require={
        "vision": ["torchvision"],
        "flash-attn": ["flash-attn>=2.6"],
        "demo": DEMO,
        "docs": DOCS,
        "plot": PLOT,
        "quantise": ["torchao>=0.18,<0.19"],
        "serving": SERVING,
        "train": TRAIN,
        "trl": [*TRAIN, *TRL],
        "mutate": ["cosmic-ray>=8.4"],
        "dev": [
            *BROWSER,
            *DOCS,
            *NOTEBOOKS,
            *PLOT,
            *SERVING,
            *TRAIN,
            *TRL,
            "httpx",
            "hypothesis",
            "mypy",
            "parameterized",
            "pytest",
            "pytest-cov",
            "pytest-rerunfailures",
            "pytest-timeout",
            "pytest-xdist",
            "requests",
            "ruff",
            "scikit-image",
            "transformers-mlinter",
        ],
    },
    entry_points={
        "console_scripts": ["llava-family = llava_family.cli:main"],
        # Called in every process of vLLM: the engine's workers import nothing else of this package.
        "vllm.general_plugins": ["llava_family = llava_family.vllm_plugin:register_for_vllm"],
        # Called by lmms-eval for the models that it does not have itself
        "lmms_eval.models": ["llava_family = llava_family.evaluation.lmms_eval_plugin:model_manifests"],
    },
)
