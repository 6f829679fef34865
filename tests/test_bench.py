"""bench.py and gpu.py on small shapes, and the memory plan against simulated runs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import model
from runs import ENVIRONMENT, ROOT

RUNS = json.loads((Path(__file__).parent / "memory.json").read_text())["runs"]


@pytest.mark.parametrize("parts", [["iteration"],
                                   pytest.param(["machine", "tests", "tiny", "denoise", "vae", "offload",
                                                 "compiled", "fused"], marks=pytest.mark.slow)])
def test_the_gpu_check_runs_without_one(tmp_path, parts):
    done = subprocess.run([sys.executable, str(ROOT / "tests/gpu.py"), *parts], capture_output=True,
                          text=True, timeout=600,
                          env=ENVIRONMENT | {"OUT": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results) == parts and all(result["rows"] and not result["error"]
                                          for result in results.values())
    if "iteration" in parts:
        assert ["first ratio - 1, in float32", "[0.0, 0.0]", "0"] in results["iteration"]["rows"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_the_plan_agrees_with_simulated_runs(run):
    """What is allocated at most, within 10%, in the mode that the plan chooses."""
    sizes = {key: run[key] for key in ("edit", "latents", "group", "offload") if key in run}
    job = bench.plan_job(run["side"], world=run["world"], **({"edit": False} | sizes))
    size = run["gib"] * 2**30 - model.context_bytes(run["world"]) - model.SLACK
    _, phases = model.choose_mode(bench.REAL, bench.REAL_VAE, run["world"], job, size)
    planned = max(phases.values()) / 2**30
    assert planned == pytest.approx(run["allocated"], rel=0.1) and planned <= size / 2**30


def test_what_does_not_fit_is_refused_with_its_numbers(monkeypatch):
    job = bench.plan_job(512, False, world=1)
    monkeypatch.setattr(model, "all_gather_list", lambda values: values)
    monkeypatch.setattr(model.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(model, "device_memory", lambda device: 79 * 2**30)
    with pytest.raises(model.UserError,
                       match=r"updates \d+\.\d, .* of 7[0-9] GiB\n(.*\n)*Less memory takes: --offload"):
        model.plan_memory(bench.REAL, bench.REAL_VAE, torch.device("cuda"), job)
    monkeypatch.setattr(model, "host_memory", lambda: 64 * 2**30)
    with pytest.raises(model.UserError, match="Adam 53.0, .* of 64 GiB a machine"):
        model.plan_memory(bench.REAL, bench.REAL_VAE, torch.device("cuda"), job._replace(offload=True))


@pytest.mark.parametrize("gpus, gib, fits", [(1, 139, True), (1, 79, False), (8, 79, True)])
def test_plan_counts_the_real_model(capsys, gpus, gib, fits):
    args = SimpleNamespace(gpus=gpus, gib=gib, tflops=790, size=1024, prompts=1, group_size=1,
                           sampler_steps=40, timesteps=4,
                           micro_batch=None, edit=False, offload=False, judge=False)
    bench.bench_plan(args)
    out = capsys.readouterr().out
    assert out.startswith("7,115,124,736 parameters") and ("does not fit" not in out) == fits
    rollout = float(next(line for line in out.splitlines() if "rollout" in line).split()[-2])
    # reference: 40 guided steps of one 1024 px image at 790 TFLOP/s
    assert rollout == pytest.approx(6.71 / gpus, abs=0.06)


def test_shared_prefix_bench_has_equal_gradients(capsys):
    bench.bench_prefix(rounds=1)
    out = capsys.readouterr().out
    assert float(out.split("gradients ")[1].split()[0]) < 1e-5
    assert float(out.split("shared")[1].split()[2].rstrip("x")) > 1.3  # 2.5 on a quiet machine


def test_peak_is_a_rate(capsys):
    assert 1e8 < model.matmul_peak(torch.device("cpu")) < 1e14
