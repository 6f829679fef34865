"""What only a GPU can show, on the tiny model; skipped without one."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import model
from runs import ORACLE, SMALL, run_script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TINY = Path(__file__).resolve().parent / "tiny" / "model"


def sample(sampler, length, cfg=2.0):
    """Three images of a random prompt of so many tokens, with two stochastic steps."""
    generator = torch.Generator().manual_seed(length)
    width = sampler.model.config["context_in_dim"]
    pair = tuple(model.EncodedPrompt(torch.randn(n, width, generator=generator), [False] * n, [])
                 for n in (length, 3))
    grid, t, _ = model.sampling_settings(TINY, (64, 64), 6)
    generators = [model.noise_stream(0, 0, 0, g) for g in range(3)]
    return sampler([pair] * 3, generators, grid, t, model.noise_levels(t, [0, 2], 0.7), cfg)[0]


@pytest.fixture
def network():
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `setup` does
    return model.materialise(model.new_transformer(TINY, torch.bfloat16), TINY,
                             torch.device("cuda", 0)).requires_grad_(False)


def test_graph_equals_eager_bit_for_bit(network):
    """For shapes that share the arena, replayed and captured anew, with guidance and without, and after new
    weights in place.
    """
    eager, graph = model.Sampler(network, graphs=False), model.Sampler(network, graphs=True)
    for length, cfg in ((5, 2.0), (9, 2.0), (5, 2.0), (9, 1.0), (5, 1.0)):
        assert torch.equal(sample(graph, length, cfg), sample(eager, length, cfg))
    with torch.no_grad():
        for param in network.parameters():
            param.mul_(1.01)
    assert torch.equal(sample(graph, 5), sample(eager, 5))
    graph.drop()
    assert not graph.entries and torch.equal(sample(graph, 5), sample(eager, 5))


def test_a_sampler_may_go_while_its_replays_run(network):
    """The next one's graphs take its memory; nothing here waits for the GPU before that."""
    images = [sample(model.Sampler(network, graphs=True), length) for length in range(4, 12)]
    eager = [sample(model.Sampler(network, graphs=False), length) for length in range(4, 12)]
    assert all(map(torch.equal, images, eager))


def test_a_thread_may_use_the_gpu_while_a_graph_is_captured(network):
    done, failed = threading.Event(), []

    def work():
        try:
            while not done.is_set():
                torch.randn(256,
                            256).pin_memory().cuda().matmul(torch.ones(256, 256, device="cuda")).sum().item()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        images = [sample(model.Sampler(network, graphs=True), length) for length in range(4, 12)]
    finally:
        done.set()
        thread.join()
    eager = [sample(model.Sampler(network, graphs=False), length) for length in range(4, 12)]
    assert not failed and all(map(torch.equal, images, eager))


@pytest.mark.parametrize("flags, bar", [([], 0.0), (["--compile"], 1e-2)])
def test_the_first_ratio_of_a_training_step(tmp_path, flags, bar):
    (line,) = run_script(tmp_path, "--reward", ORACLE, "--steps", "1", *SMALL, *flags)
    assert line["ratio_dev"][0] <= bar and line["skipped_updates"] == 0 and line["failed"] == 0


def test_a_judge_that_left_the_gpu_comes_back(tmp_path):
    """From locked host memory, which is given back with it; a second judge may get the same addresses."""
    device = torch.device("cuda", 0)
    for _ in range(2):
        rewards = model.load_rewards(["aesthetic"], TINY)
        model.load_vlms(rewards, device)
        model.seat_judges(rewards, device)
        pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "white", "blue")]
        (thread,) = model.reward_threads(rewards, device)
        before = thread.submit(rewards[0].score, pictures, [""] * 3, [[]] * 3).result()
        held = torch.cuda.memory_allocated()
        model.unseat_judges(rewards)
        assert torch.cuda.memory_allocated() < held - 0.9 * model.vlm_bytes(rewards)
        model.seat_judges(rewards, device)
        assert thread.submit(rewards[0].score, pictures, [""] * 3, [[]] * 3).result() == before
