"""Run the scripts the way a user does, for the tests."""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's library: what is not there is not looked for

import model
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent
ORACLE = f"aesthetic={ROOT / 'tests/tiny/world.py'}:aesthetic_reward"
SMALL = ["--group-size", "4", "--eval-images", "0", "--sample-every", "0", "--prompts-per-step", "4",
         "--name", "run"]
# what the scripts import when they need it; here at once, so that no garbage collection walks it
LATE = ["transformers.models.auto.modeling_auto", "transformers.models.qwen3_vl.modeling_qwen3_vl"]
for late in LATE:
    importlib.import_module(late)
gc.freeze()
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def read_log(folder):
    return [json.loads(line) for line in (folder / "runs" / "run" / "log.jsonl").read_text().splitlines()]


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def start_script(folder, *arguments, script="grpo.py", processes=1, code=None):
    """A script, or code that imports it, as processes of its own: what they printed, and a return code that
    is not 0 if one of them failed.
    """
    if code:
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=folder, timeout=300,
                              env=ENVIRONMENT, capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
             for rank in range(processes)]
    with tempfile.NamedTemporaryFile("r") as printed:
        what = str(folder), str(ROOT / script), [*map(str, arguments)], printed.name
        started = [FORKS.Process(target=as_main, args=(*what, environment)) for environment in ranks]
        for process in started:
            process.start()
        deadline = time.monotonic() + 300
        try:
            while any(process.is_alive() for process in started) and not any(p.exitcode for p in started):
                assert time.monotonic() < deadline, printed.read()
                time.sleep(0.05)
            code = next((process.exitcode for process in started if process.exitcode), 0)
            for process in started:  # as torchrun does: one that fails takes the others along
                process.join(20 if code else None)
        finally:
            for process in started:
                process.kill()
        return printed.read(), code


# What torchrun starts, without the seconds that imports take: a process that has them is forked. That
# torchrun itself starts the scripts, the README's commands show.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["model", *LATE])


def as_main(folder, script, arguments, printed, environment):
    """In a process of its own: a script as `python SCRIPT ARGUMENTS` runs it."""
    out = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(folder)
    os.environ.update({key: str(value) for key, value in environment.items()})
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    if (Path(script).parent / "model.py").exists() and Path(script).parent != ROOT:
        sys.modules.pop("model", None)  # a fork has its own
    runpy.run_path(script, run_name="__main__")


def loaded_rewards(specs, root):
    """The rewards of `--reward` values, ready to score on a CPU."""
    rewards = model.load_rewards(specs, root)
    model.load_vlms(rewards, torch.device("cpu"))
    return rewards


def run_here(folder, script, *arguments):
    """A script's main in this process, in `folder`."""
    before, handlers = os.getcwd(), {number: signal.getsignal(number)
                                     for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        importlib.import_module(Path(script).stem).main([*map(str, arguments)])
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        while model.LOCKS:
            model.LOCKS.pop().close()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


def printed_by(folder, script, *arguments, processes=1):
    """Run a script in `folder`, in this process where one will do; returns what it printed."""
    if processes > 1:
        printed, failed = start_script(folder, *arguments, script=script, processes=processes)
        assert not failed, printed[-4000:]
        return printed
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_here(folder, script, *arguments)
    return printed.getvalue()


def run_script(folder, *arguments, script="grpo.py", processes=1, code=None):
    """Run a training script in `folder`, in this process where one will do; returns its log lines."""
    if processes > 1 or code:
        printed, failed = start_script(folder, *arguments, script=script, processes=processes, code=code)
        assert not failed, printed[-4000:]
    else:
        run_here(folder, script, *arguments)
    return read_log(folder)


def checkpoint(folder):
    """The newest complete checkpoint of a run as {kind: {name: tensor}}; a kill may leave the one before."""
    saved = (folder / "runs" / "run" / "checkpoint").iterdir()
    path = max(path for path in saved if path.suffix != ".part")
    dcp_to_torch_save(path, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=False)


def assert_same_bits(one, two):
    """Two checkpoints: weights, optimizer state and the old policy, if there is one."""
    for kind in ("model", "old"):
        assert one.get(kind, {}).keys() == two.get(kind, {}).keys()
        for name, value in one.get(kind, {}).items():
            assert torch.equal(value, two[kind][name]), (kind, name)
    for name, state in one["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][name][key]), (name, key)
