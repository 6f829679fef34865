"""bench.py on small shapes: what it says of the real ones comes from the same lines."""

from types import SimpleNamespace

import pytest
import torch

import bench
import model

SMALL = bench.REAL | dict(in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                          axes_dims_rope=[4, 6, 6], context_in_dim=96)
SMALL_VAE = bench.REAL_VAE | dict(base_dim=4, decoder_base_dim=4, z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)


@pytest.mark.slow
def test_denoise_compares_eager_and_compiled_blocks(capsys):
    bench.bench_denoise(SMALL, (64,), torch.device("cpu"), batch=2, steps=2, rounds=1, length=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["64 px, eager", "64 px, compiled, eager"]
    assert all(float(line.split()[-3]) > 0 and float(line.split()[-2].rstrip("%")) > 0 for line in lines[2:])


@pytest.mark.slow
def test_iteration_runs_grpo_on_a_random_checkpoint(capsys):
    bench.bench_iteration(SMALL, SMALL_VAE, (64,), ["--prompts-per-step", "2", "--group-size", "2", "--sampler-steps", "8"], steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("64 px ") and lines[2].startswith("64 px --compile")
    assert all(float(cell) >= 0 for line in lines[1:] for cell in line.split()[-6:-2])


@pytest.mark.parametrize("gpus, gib, fits", [(1, 139, True), (1, 79, False), (8, 79, True)])
def test_plan_counts_the_real_model(capsys, gpus, gib, fits):
    args = SimpleNamespace(gpus=gpus, gib=gib, tflops=790, size=[1024], prompts=1, group_size=1, sampler_steps=40, timesteps=4,
                           micro_batch=None, edit=False, offload=False, judge=False)
    bench.bench_plan(args)
    out = capsys.readouterr().out
    assert out.startswith("7,115,124,736 parameters") and ("does not fit" not in out) == fits
    rollout = float(next(line for line in out.splitlines() if "rollout" in line).split()[-2])
    assert rollout == pytest.approx(6.71 / gpus, abs=0.06)  # reference: 40 guided steps of one 1024 px image at 790 TFLOP/s


def test_shared_prefix_bench_has_equal_gradients(capsys):
    bench.bench_prefix(rounds=1)
    out = capsys.readouterr().out
    assert float(out.split("gradients ")[1].split()[0]) < 1e-5
    assert float(out.split("shared")[1].split()[2].rstrip("x")) > 1.3  # 2.5 on a quiet machine


def test_peak_is_a_rate(capsys):
    assert 1e8 < model.matmul_peak(torch.device("cpu")) < 1e14
