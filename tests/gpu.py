"""Everything that only a GPU can show, in one command and at most 25 minutes. Each part runs in a process of
its own, bounded in time, so that a failure leaves the others.

    python tests/gpu.py                     # on a GPU: the 7B shape; on a CPU: small shapes, to see it work
    python tests/gpu.py denoise iteration   # some of the parts

  machine     card, versions, speed of a matrix product
  tests       tests/test_cuda.py
  tiny        grpo.py, nft.py, opd.py and an edit run on the tiny model, with and without the graph
  denoise     one sampler step by size: eager, graph, graph with cuDNN attention; text-to-image and an edit
  iteration   whole GRPO iterations: seconds by part, MFU, memory against the plan, the first ratio
  vae         the real-size VAE in bf16 against fp32
  offload     the iterations with --offload
  compiled    the sampler's steps with compiled blocks, and how long compiling takes
  fused       the iterations with --compile --cudnn

Prints what was measured beside what was predicted, and writes gpu.json into $OUT if that is set, else beside
this file.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOTAL = 1500  # seconds for all parts together

import model  # before torch: it sets the number of threads and the allocator
import torch

from bench import REAL, REAL_VAE, free, interleaved, random_network, random_prompt

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SHAPE = REAL if CUDA else REAL | dict(in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16,
                                      num_attention_heads=2,
                                      axes_dims_rope=[4, 6, 6], context_in_dim=96)
VAE_SHAPE = REAL_VAE if CUDA else REAL_VAE | dict(base_dim=4, decoder_base_dim=4, z_dim=8,
                                                  latents_mean=[0.0] * 8,
                                                  latents_std=[1.0] * 8)
SIDES = (512, 1024) if CUDA else (64, 128)


WRONG = []  # what this part found wrong


def show(what, value, predicted="", right=True):
    """One line of the table: `value` and `predicted` are strings; what is not `right` makes the part fail at
    its end.
    """
    print("RESULT " + json.dumps([what, value, predicted]), flush=True)
    WRONG.extend([] if right else [what])


# ---- parts -------------------------------------------------------------------------------------------------


def part_machine():
    import transformers
    card = torch.cuda.get_device_properties(0) if CUDA else None
    name = platform.processor() or platform.machine()
    if CUDA:
        name = f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
    show("device", f"{name}; {os.cpu_count()} cores, {model.host_memory() / 2**30:.0f} GiB of host memory")
    show("versions",
         f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
         f"{platform.python_version()}")
    show("matrix product, TFLOP/s", f"{model.matmul_peak(DEVICE) / 1e12:.3g}",
         "780 on an H200" if CUDA else "")


def part_tests(limit=240):
    """Each in a process of its own, as one that hangs would take the others with it."""
    tests = ROOT / "tests" / "test_cuda.py"
    for name in re.findall(r"^def (test_\w+)", tests.read_text(), re.MULTILINE):
        command = ["timeout", "--signal=KILL", str(limit), sys.executable, "-m", "pytest", "-o",
                   f"faulthandler_timeout={limit - 10}", f"{tests}::{name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout + done.stderr).strip().splitlines()
        show(name, lines[-1] if lines else f"ended after {limit} s", "passed" if CUDA else "skipped",
             right=done.returncode == 0)
        if done.returncode:
            print("\n".join(lines[-60:]), file=sys.stderr)


def part_tiny():
    """Rewards of two steps with graph and without; the same noise and weights, so the same numbers."""
    from runs import SMALL, run_script
    arguments = {"grpo.py": ["--reward", "aesthetic"], "nft.py": ["--reward", "aesthetic"],
                 "opd.py": ["--teacher", f"t2i={TINY / 'model'}", f"edit={TINY / 'model'}"],
                 "grpo.py, edits": ["--reward", str(TINY / "rewards_edit.json"), "--prompts",
                                    str(TINY / "edits.jsonl"),
                                    "--eval-prompts", str(TINY / "edits_heldout.jsonl")],
                 "grpo.py, --offload": ["--reward", "aesthetic", "--offload"]}
    for name, flags in arguments.items():
        lines, began = [], time.perf_counter()
        for graph in (["--graph"] if CUDA else [], ["--no-graph"]):
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                lines.append(run_script(Path(folder), *flags, "--steps", "2", *SMALL, *graph,
                                        script=name.partition(",")[0]))
        keys = ("reward", "velocity_error")
        same = all(a.get(key) == b.get(key) for a, b in zip(*lines) for key in keys)
        ratio = f", first ratio - 1: {lines[0][0]['ratio_dev'][0]:.1g}" if "ratio_dev" in lines[0][0] else ""
        numbers = [[line.get(key) for line in run for key in keys] for run in lines]
        found = "the same numbers" if same else f"differ: {numbers}"
        show(f"{name}: graph against eager", f"{found}{ratio}; {time.perf_counter() - began:.0f} s",
             "the same numbers" + ", first ratio - 1: 0" * bool(ratio),
             same and lines[0][0].get("ratio_dev", [0])[0] == 0)


def denoise(network, peak, kinds, rounds=2, steps=4, length=128):
    """Seconds of one image's step with guidance, for kinds {name: Sampler's keywords}, at every size and for
    an edit.
    """
    scheduler = model.read_config(TINY / "model" / "scheduler" / "scheduler_config.json")
    for side, edit in [(side, False) for side in SIDES] + [(SIDES[-1], True)]:
        grid = (side // 16, side // 16)
        batch = max(1, 2 * (SIDES[-1] // side) ** 2)
        t = model.timesteps(scheduler, grid[0] * grid[1], steps)
        pair = [random_prompt(SHAPE, n, i, grid if edit else None) for i, n in enumerate((length, 10))]
        samplers = {kind: model.Sampler(network, **options) for kind, options in kinds.items()}
        images = {}

        def sample(kind):
            generators = [model.noise_stream(0, 0, 0, g) for g in range(batch)]
            images[kind] = samplers[kind]([pair] * batch, generators, grid, t, torch.zeros(steps), 4.0)[0]

        for kind in list(samplers):
            try:
                sample(kind)
            except RuntimeError as error:  # the other kinds are measured all the same
                show(f"{side} px{', edit' * edit}, {kind}", f"FAILED: {error}"[:300], right=False)
                samplers.pop(kind).drop()
        seconds = interleaved({kind: lambda kind=kind: sample(kind) for kind in samplers}, rounds)
        work = sum(model.forward_flops(SHAPE, grid[0] * grid[1], prompt) for prompt in pair)
        first, base = next(iter(images.values())), next(iter(seconds.values()))
        for kind, value in seconds.items():
            each = value / steps / batch
            away = ((images[kind] - first).norm() / first.norm()).item()
            show(f"{side} px{', edit' * edit}, {kind}, s/image/step",
                 f"{each:.4f}, {work / each / peak:.0%} of the peak, "
                 f"{base / value:.2f}x, relative difference {away:.1g}", PREDICTED.get(kind, ""),
                 right=away < 0.1)
        for sampler in samplers.values():
            sampler.drop()


PREDICTED = {"eager": "51-61% of the peak", "graph": "1.00-1.01x, no difference",
             "graph, cuDNN": "1.03-1.12x of eager",
             "compiled": "56-70% of the peak", "compiled, graph": "1.00-1.01x, no difference"} if CUDA else {}


def seven_billion():
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `setup` does
    return random_network(SHAPE, DEVICE, model.compute_dtype(DEVICE)), model.matmul_peak(DEVICE)


def part_denoise():
    kinds = {"eager": dict(graphs=False)}
    if CUDA:
        kinds |= {"graph": dict(graphs=True), "graph, cuDNN": dict(graphs=True, cudnn=True)}
    denoise(*seven_billion(), kinds)


def part_compiled():
    network, peak = seven_billion()
    model.compile_blocks(network)
    grid, began = (SIDES[0] // 16,) * 2, time.perf_counter()
    prompt = random_prompt(SHAPE, 128, 0)
    with torch.no_grad():
        network.velocity(torch.randn(2, grid[0] * grid[1], SHAPE["in_channels"], device=DEVICE),
                         torch.ones(2, device=DEVICE),
                         network.prefix([prompt], grid))
    show("compiling prefix and step, s", f"{time.perf_counter() - began:.0f}", "16" if CUDA else "336 cold")
    denoise(network, peak,
            {"compiled": dict(graphs=False)} | ({"compiled, graph": dict(graphs=True)} if CUDA else {}))


def random_weights(module, directory, unused=None):
    """Stands for `load_weights`: values of the right size, drawn on the device, nothing on disk."""
    with torch.no_grad():
        for name, param in module.named_parameters():
            local = param.to_local() if hasattr(param, "to_local") else param.data
            if local.ndim == 1:
                local.fill_(0.0 if "text_norm" in name or "bias" in name else 1.0)
            else:
                generator = torch.Generator(DEVICE).manual_seed(len(name))
                local.copy_(torch.randn(local.shape, device=DEVICE,
                                        generator=generator) * local[0].numel() ** -0.5)
    return module


def part_iteration(*extra):
    """grpo.py at this shape, with weights drawn in place and no model written, and with `extra` flags."""
    offload, fused = "--offload" in extra, "--compile" in extra
    if CUDA and not offload and model.device_memory(DEVICE) < 125 * 2**30:
        return show("iteration",
                    "left out: weights, gradients and Adam of 7B parameters in fp32 need 125 GiB")
    import grpo
    from runs import run_here
    model.load_weights = random_weights
    grpo.save_model = lambda *_: None
    plans = []
    choose = model.choose_mode
    model.choose_mode = lambda *arguments: plans.append(choose(*arguments)) or plans[-1]
    kl = [] if not offload or model.host_memory() > 145 * 2**30 else ["--kl-coef", "0"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "model"
        for name, config in (("transformer", SHAPE | {"context_in_dim": 96}), ("vae", VAE_SHAPE)):
            (root / name).mkdir(parents=True)
            model.write_text(root / name / "config.json", json.dumps(config))
        for name in ("processor", "scheduler", "text_encoder"):
            (root / name).symlink_to(TINY / "model" / name)
        index = {"_class_name": "QwenImage21Pipeline", "_sampling": {"guidance_scale": 4.0}}
        model.write_text(root / "model_index.json", json.dumps(index))
        flags = ["--size", str(SIDES[0]), str(SIDES[0]), "--steps", "2", "--prompts-per-step", "2",
                 "--sampler-steps", "10",
                 "--eval-images", "0", "--sample-every", "0", "--save-every", "0", *extra, *kl]
        reward = f"r={ROOT / 'tests' / 'bench.py'}:{free.__name__}"
        run_here(folder, "grpo.py", "--model", root, "--name", "run", "--reward", reward, *flags)
        lines = [json.loads(line)
                 for line in (Path(folder) / "runs" / "run" / "log.jsonl").read_text().splitlines()]
    mode, phases = plans[-1]
    last = lines[-1]
    name = ", ".join([f"{SIDES[0]} px", "2 prompts x 8 images", "10 steps", *extra, " ".join(kl)]).strip(", ")
    show(name, "; ".join(model.describe(mode)[:2]))
    show("seconds of the second iteration",
         ", ".join(f"{part} {value:.2f}" for part, value in last["seconds"].items()))
    show("MFU", f"{last['mfu']:.1%}", "33%" if offload else "50-53%")
    first, second = ([line["ratio_dev"][update] for line in lines] for update in (0, 1))
    show(f"first ratio - 1, in {str(model.compute_dtype(DEVICE)).removeprefix('torch.')}", str(first),
         "0.02" if fused else "0", right=max(first) < 0.05 if fused else not any(first))
    show("second ratio - 1", str(second), "small, not 0", right=all(second))
    if CUDA:
        planned = max(phases.values()) / 2**30
        show("GiB allocated, reserved at most", f"{last['peak_gib']:.1f}, {last['reserved_gib']:.1f}",
             f"{planned:.1f} allocated")


def part_vae(side=1024 if CUDA else 128):
    images, latents = {}, torch.randn(1, VAE_SHAPE["z_dim"], side // 16, side // 16, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            vae = model.VAE(VAE_SHAPE).to(dtype)
        vae = random_weights(vae.to_empty(device=DEVICE),
                             None).to(memory_format=torch.channels_last).requires_grad_(False)
        torch.cuda.reset_peak_memory_stats() if CUDA else None
        images[dtype] = vae.decode(latents)
        seconds = interleaved({"decode": lambda vae=vae: vae.decode(latents)}, 3)["decode"]
        most = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most" if CUDA else ""
        show(f"VAE, {side} px, {str(dtype).removeprefix('torch.')}", f"{seconds:.3f} s{most}",
             f"{model.DECODING * 2 * VAE_SHAPE['decoder_base_dim'] * side**2 / 2**30 + 0.7:.1f} GiB"
             if dtype == torch.bfloat16 else "")
    a, b = images.values()
    show("bf16 against fp32, relative", f"{((b - a).norm() / a.norm()).item():.1e}",
         "about 1e-2 (random weights)")


PARTS = {"machine": (part_machine, 60), "tests": (part_tests, 300), "tiny": (part_tiny, 120),
         "denoise": (part_denoise, 140),
         "iteration": (part_iteration, 200), "vae": (part_vae, 60),
         "offload": (lambda: part_iteration("--offload"), 200),
         "compiled": (part_compiled, 140),
         "fused": (lambda: part_iteration("--compile", "--cudnn"), 240)}  # seconds


# ---- all parts ---------------------------------------------------------------------------------------------


def run_part(name, limit):
    """A part's [what, value, predicted], and its error if it had one."""
    process = subprocess.Popen([sys.executable, __file__, "--part", name], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               start_new_session=True, cwd=ROOT)
    try:
        printed, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, errors = process.communicate()
        errors += f"\nended after its {limit:.0f} s"
    rows = [json.loads(line.removeprefix("RESULT "))
            for line in printed.splitlines() if line.startswith("RESULT ")]
    return rows, None if process.returncode == 0 else "\n".join(errors.strip().splitlines()[-60:])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        PARTS[args.part][0]()
        sys.exit(f"not as it should be: {'; '.join(WRONG)}" if WRONG else 0)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results, end = {}, time.monotonic() + TOTAL
    for name in args.parts or PARTS:
        began = time.monotonic()
        rows, error = run_part(name, min(PARTS[name][1], max(5, end - began)))
        results[name] = {"seconds": round(time.monotonic() - began, 1), "rows": rows, "error": error}
        print(f"\n{name} ({results[name]['seconds']:.0f} s)")
        for what, value, predicted in rows:
            print(f"  {what}: {value}" + f"   [predicted: {predicted}]" * bool(predicted))
        if error:
            print("  FAILED: " + error.replace("\n", "\n    "), flush=True)
    target = Path(os.environ.get("OUT", ROOT / "tests")) / "gpu.json"
    model.write_text(target, json.dumps(results, indent=2))
    print(f"\n{sum(result['error'] is None for result in results.values())} of {len(results)} parts ran to "
          f"the end; {target}")
    sys.exit(any(result["error"] for result in results.values()))


if __name__ == "__main__":
    main()
