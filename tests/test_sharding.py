"""The network over ranks: every way to treat it during an update gives the same gradients, in host memory as
on the device; several machines."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from runs import ENVIRONMENT, ORACLE, ROOT, SMALL, checkpoint, read_log, run_script, start_script

GRADIENTS = """
import gc, sys, torch, torch.distributed as dist, model

def gradients(dtype, mode, offload, device, rank):
    model.compute_dtype = lambda device: dtype
    root = model.Path(sys.argv[1])
    policy = model.shard(model.new_transformer(root, torch.float32), device, offload)
    policy = model.materialise(policy, root, device)
    width, found = policy.config["context_in_dim"], []
    for update in range(2):
        model.keep_gathered(policy, mode.keep_weights, mode.reduce_once)
        # the first update reaches the text layers in its last backward pass alone
        for group in range(update + 1):
            generator = torch.Generator().manual_seed(10 * rank + group)
            prompt = model.EncodedPrompt(torch.randn(5, width, generator=generator), [False] * 5, [])
            prefixes = [policy.prefix([prompt], (4, 4))]
            leaves = [model.detach_prefix(prefix) for prefix in prefixes]
            for _ in range(2):
                x = torch.randn(1, 16, 16, generator=generator)
                v = policy.velocity(x, torch.tensor([0.9]), *leaves)
                v.pow(2).mean().backward()
            model.backward_prefixes(prefixes, leaves)
            del prefixes, leaves, v
        if mode.reduce_once:
            model.reduce_gradients(policy)
        model.release(policy)
        found.append({name: param.grad.full_tensor().clone() for name, param in policy.named_parameters()})
        policy.zero_grad(set_to_none=True)
    return found

def main():
    rank, world, device = model.setup()
    for dtype in (torch.float32, torch.bfloat16):
        first = gradients(dtype, model.MODES[-1], False, device, rank)
        gathered, each = model.Mode(), model.Mode(reduce_once=False)
        modes = [(gathered, False), (each, False), (gathered, True), (model.MODES[-1], True)]
        for mode, offload in modes[:2] if dtype == torch.bfloat16 else modes:
            other = gradients(dtype, mode, offload, device, rank)
            worst = max(((b[name] - a[name]).norm() / a[name].norm()).item()
                        for a, b in zip(first, other) for name in a)
            if rank == 0:
                print("WORST", dtype, mode.keep_weights, mode.reduce_once, offload, worst)

main()
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gathered_reduced_once_or_offloaded_gradients_are_the_same(tmp_path, processes):
    """Relative error 1e-5 per parameter, whether computed in fp32 or in bf16."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    printed, failed = start_script(tmp_path, ROOT / "tests/tiny/model", script=tmp_path / "gradients.py",
                                   processes=processes)
    worst = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("WORST")]
    assert not failed and len(worst) == 6 and max(worst) < 1e-5, printed[-3000:]


@pytest.mark.slow
def test_two_offloaded_ranks_resume_on_one_that_is_not(tmp_path):
    """A checkpoint of one kind opens as the other, whatever the number of ranks; with nft.py's old policy."""
    arguments = ["--reward", ORACLE, *SMALL, "--rollout-batch", "4"]
    for folder in ("whole", "offloaded"):
        (tmp_path / folder).mkdir()
    lines = run_script(tmp_path / "whole", *arguments, "--steps", "2", script="nft.py")
    run_script(tmp_path / "offloaded", *arguments, "--steps", "1", "--offload", script="nft.py", processes=2)
    again = run_script(tmp_path / "offloaded", *arguments, "--steps", "2", "--resume", script="nft.py")
    assert again[1]["grad_norm"][0] == pytest.approx(lines[1]["grad_norm"][0], rel=1e-4)
    one, other = (checkpoint(tmp_path / folder) for folder in ("whole", "offloaded"))
    for kind in ("model", "old"):  # Adam's steps are 1.6e-4
        assert all((other[kind][name] - value).abs().max() <= 1e-5 for name, value in one[kind].items())


def on_two_machines(folders, script, *arguments):
    """A script as one rank on each of two "machines", each with its own launcher and working directory: what
    they print, return codes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for node, folder in enumerate(folders):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
                    "--nproc_per_node=1",
                    "--master_addr=127.0.0.1", f"--master_port={port}", str(ROOT / script), *arguments]
        started.append(subprocess.Popen(launcher, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT,
                                        text=True, start_new_session=True))
    try:
        return [(process.communicate(timeout=200)[0], process.returncode) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_two_machines_without_a_shared_disk_are_refused(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    ends = on_two_machines(folders, "rollout.py", "a red circle", "--name", "run")
    assert all(code for _, code in ends) and any("is not the directory of that name that rank 0 has" in text
                                                 for text, _ in ends)


@pytest.mark.slow
def test_two_machines_with_a_shared_disk_train_save_and_resume(tmp_path):
    for flags in (["--steps", "1"], ["--steps", "2", "--resume"]):
        ends = on_two_machines([tmp_path, tmp_path], "grpo.py", "--reward", ORACLE, *SMALL, *flags)
        assert not any(code for _, code in ends), ends
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1]
    assert os.listdir(tmp_path / "runs/run/checkpoint") == ["step-000002"]
