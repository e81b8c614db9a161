"""`transformers serve` answers about images: with this package, and of exported repositories without it."""

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers
from transformers.utils.import_utils import is_serve_available

import llava_family
from llava_family.hub import export_model

from .conftest import ROOT


CHECKPOINTS = ROOT / "examples" / "miniature" / "checkpoints"
PICTURES = ROOT / "examples" / "images" / "miniature"
MINIATURES = {"uhd": "llava-uhd-miniature", "moe": "moe-llava-miniature", "mole": "llava-mole-miniature"}
SERVE = "from transformers.cli.transformers import main; main()"
SECONDS = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="`transformers serve` needs `pip install '.[serving]'`"),
]


@contextmanager
def server(code, packages, *options):
    """The address of a server that runs `code`, with no other packages than those of the folders `packages`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(package.__file__).parents[1]) for package in packages),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # `-S` ignores `.pth` files, by which an editable install works.
    command = [sys.executable, "-S", "-c", code, "serve", "--device", "cpu", "--port", str(port), *options]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as run,
    ):
        try:
            wait_for(f"http://localhost:{port}/health", run, log)
            yield f"http://localhost:{port}"
        finally:
            run.kill()


def wait_for(address, run, log):
    for _ in range(10 * SECONDS):
        try:
            return urllib.request.urlopen(address)
        except urllib.error.URLError:
            if run.poll() is not None:
                log.seek(0)
                pytest.fail(log.read())
            time.sleep(0.1)
    raise TimeoutError(f"{address} did not answer within {SECONDS} seconds.")


def ask(address, model, item):
    """The answer of `model` to a question about a picture, as a client of OpenAI's API asks it."""
    picture = base64.b64encode((PICTURES / item["image"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": item["question"]},
    ]
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0.0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)["choices"][0]["message"]["content"].strip()


def assert_answers_right(address, folders):
    questions = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    for family, folder in folders.items():
        for item in questions[family]:
            assert ask(address, folder, item) == item["answer"], (family, item)


def test_with_this_package():
    folders = {family: CHECKPOINTS / name for family, name in MINIATURES.items()}
    with server(f"import llava_family; {SERVE}", [llava_family, transformers]) as address:
        assert_answers_right(address, folders)


def test_exported_repositories_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = {
        family: export_model(CHECKPOINTS / name, tmp_path / family, report=lambda line: None)
        for family, name in MINIATURES.items()
    }
    with server(SERVE, [transformers], "--trust-remote-code") as address:
        assert_answers_right(address, folders)
