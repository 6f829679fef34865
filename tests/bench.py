"""Measurements that are too slow or too noisy to be tests. Each prints one table.

    python tests/bench.py sampler      # our denoise loop against diffusers' pipeline on the same weights, noise and prompts
    python tests/bench.py prefix       # an edit update with the shared prefix against recomputing it for every row
    python tests/bench.py growth       # what a step costs by group size, prompts, sampler steps and tokens
    python tests/bench.py rewards      # what slow rewards cost a GRPO step: Sec. 4.1's asynchronous pipeline
    python tests/bench.py denoise --size 512 1024         # a GPU: the 7B shape with random weights: eager, graph, compiled
    python tests/bench.py iteration --size 512            # a GPU of 140 GB, 32 GB of disk: whole GRPO iterations at that shape
    python tests/bench.py plan --gpus 8 --gib 79 --tflops 700 --size 1024      # least time and memory of an iteration, on paper

What is compared runs interleaved in one process; tables give medians.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model  # noqa: E402  before torch: it sets the number of threads
import numpy as np  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import save_torch_state_dict  # noqa: E402

BATCH, BATCHES = 16, 4  # images a rollout batch, batches a step
REAL = dict(_class_name="QwenImage21Transformer2DModel", patch_size=1, in_channels=64, out_channels=64, num_layers=32,
            attention_head_dim=128, num_attention_heads=32, context_in_dim=4096, mlp_ratio=3, axes_dims_rope=[16, 56, 56], eps=1e-6,
            causal_condition=True)  # of Qwen/Qwen-Image-2.1
REAL_VAE = dict(_class_name="AutoencoderKLQwenImage21", base_dim=96, decoder_base_dim=144, z_dim=64, dim_mult=[1, 2, 4, 8, 8],
                num_res_blocks=2, temperal_downsample=[False, True, True, True], in_channels=4, out_channels=4,
                latents_mean=[0.0] * 64, latents_std=[1.0] * 64)
ENCODER = JUDGE = 17_534_247_392  # bytes of Qwen3-VL-8B in bf16


# ---- the sampler ---------------------------------------------------------------------------------------------


def interleaved(kinds, rounds):
    """Median seconds of functions {name: function}, called in turn after one call each to warm up."""
    seconds = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, function in kinds.items():
            began = time.perf_counter()
            function()
            torch.cuda.is_available() and torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - began] * (turn > 0)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def one_length(encoded, count):
    """So many prompts of one length: diffusers places the image of a shorter prompt in a padded batch differently than alone."""
    lengths = {}
    for i, (prompt, _) in encoded.items():
        lengths.setdefault(len(prompt.slots), []).append(i)
    return max(lengths.values(), key=len)[:count]


def bench_sampler(rounds=5, prompts=8, group=8, steps=40, cfg=4.0):
    if not importlib.util.find_spec("diffusers"):
        raise SystemExit("bench.py sampler needs: pip install diffusers==0.42.1")
    from test_diffusers import load_pipeline
    device, requests = torch.device("cpu"), dict(enumerate(model.load_prompts(TINY / "heldout.jsonl")))
    vae, (grid, t, _) = model.load_vae(TINY / "model", device, torch.float32), model.sampling_settings(TINY / "model", steps=steps)
    encoded = model.encode_prompts(TINY / "model", vae, requests, 256 * grid[0] * grid[1], device)
    chosen = one_length(encoded, prompts)
    images = [(0, i, g) for i in chosen for g in range(group)]
    samplers = {}
    for kind in ("ours", "ours, compiled"):
        network = model.materialise(model.new_transformer(TINY / "model", torch.float32), TINY / "model", device)
        samplers[kind] = model.Sampler(network.requires_grad_(False), graphs=False)
    for block in network.transformer_blocks:
        block.compile(dynamic=True)
    pipeline = load_pipeline(TINY / "model")
    noise = torch.stack([torch.randn(grid[0] * grid[1], 16, generator=model.image_generator(0, *key)) for key in images])
    embeds, mask = pipeline.encode_prompt([requests[i].prompt for i in chosen], num_images_per_prompt=1)[:2]
    empty, empty_mask = pipeline.encode_prompt([" "] * prompts, num_images_per_prompt=1)[:2]

    def theirs(output_type):
        return pipeline(prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=empty,
                        negative_prompt_embeds_mask=empty_mask, num_images_per_prompt=group, true_cfg_scale=cfg, latents=noise.clone(),
                        height=16 * grid[0], width=16 * grid[1], output_resolution=16 * grid[0],
                        sigmas=np.linspace(1, 1 / steps, steps).tolist(), output_type=output_type).images

    def ours(kind):
        generators = [model.image_generator(0, *key) for key in images]
        return samplers[kind]([encoded[i] for _, i, _ in images], generators, grid, t, torch.zeros(steps), cfg)[0]

    def ours_to_the_end():
        return [image for _, batch, _ in model.generate(samplers["ours"], vae, encoded, images, grid, t, torch.zeros(steps), cfg, 0,
                                                        len(images)) for image in batch]

    pixels = vae.decode(theirs("latent").mT.unflatten(2, grid))
    for kind in samplers:
        error = (vae.decode(ours(kind).mT.unflatten(2, grid)) - pixels).abs().max() / 2
        print(f"{kind}: largest difference of a pixel {error:.1e} of its range")
    seconds = interleaved({"diffusers": lambda: theirs("latent"), **{kind: lambda kind=kind: ours(kind) for kind in samplers},
                           "diffusers with VAE": lambda: theirs("pil"), "ours with VAE": ours_to_the_end}, rounds)
    peak = model.matmul_peak(device)
    work = group * steps * sum(model.forward_flops(network.config, grid[0] * grid[1], prompt)
                               for i in chosen for prompt in encoded[i])
    print(f"{prompts} prompts x {group} images, {steps} steps, guidance {cfg:g}, {torch.get_num_threads()} thread")
    print(f"{'':<20}{'seconds':>9}{'speed-up':>10}{'share of matmul peak':>22}")
    for kind, value in seconds.items():
        base = seconds["diffusers with VAE" if "VAE" in kind else "diffusers"]
        print(f"{kind:<20}{value:>9.2f}{base / value:>10.2f}{work / value / peak:>22.0%}")
    print(f"the matrix products alone, at {peak / 1e9:.0f} GFLOP/s, take {work / peak:.2f} s")


# ---- the shared prefix ---------------------------------------------------------------------------------------


def bench_prefix(rounds=7, group=8, draws=4, micro_batch=32):
    """One edit group's forward and backward passes: G images x 4 timesteps, a source image as large as the output."""
    device, grid = torch.device("cpu"), model.sampling_settings(TINY / "model")[0]
    requests = {0: model.load_prompts(TINY / "edits.jsonl")[0]}
    vae = model.load_vae(TINY / "model", device, torch.float32)
    prompt, _ = model.encode_prompts(TINY / "model", vae, requests, 256 * grid[0] * grid[1], device)[0]
    network = model.materialise(model.new_transformer(TINY / "model", torch.float32), TINY / "model", device)
    x, target = torch.randn(2, group * draws, grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.5, 1, draws).repeat_interleave(group)
    parts = torch.arange(group * draws).split(micro_batch)

    def shared():
        prefix = network.prefix([prompt], grid)
        leaves = model.detach_prefix(prefix)
        for part in parts:
            (network.velocity(x[part], t[part], leaves) - target[part]).pow(2).sum().backward()
        model.backward_prefixes([prefix], [leaves])

    def recomputed():
        for part in parts:
            prefix = network.prefix([prompt] * len(part), grid)
            (network.velocity(x[part], t[part], prefix) - target[part]).pow(2).sum().backward()

    def gradient(update):
        network.zero_grad()
        update()
        return torch.cat([param.grad.flatten() for param in network.parameters()])

    a, b = gradient(shared), gradient(recomputed)
    seconds = interleaved({"recomputed": recomputed, "shared": shared}, rounds)
    print(f"prefix of {model.prefix_tokens(prompt)} tokens ({4 * sum(prompt.slots)} of the source image), {grid[0] * grid[1]} target "
          f"tokens, {group} images x {draws} timesteps; relative difference of the gradients {((a - b).norm() / b.norm()).item():.1e}")
    for kind, value in seconds.items():
        print(f"{kind:<12}{1000 * value:>8.1f} ms{seconds['recomputed'] / value:>8.2f}x")


# ---- growth --------------------------------------------------------------------------------------------------


def bench_growth(rounds=3):
    """Seconds of a sampler call when one of its sizes doubles."""
    device, root = torch.device("cpu"), TINY / "model"
    requests = dict(enumerate(model.load_prompts(TINY / "heldout.jsonl")[:16]))
    vae = model.load_vae(root, device, torch.float32)
    encoded = model.encode_prompts(root, vae, requests, 64 * 64, device)
    network = model.materialise(model.new_transformer(root, torch.float32), root, device).requires_grad_(False)
    sampler, base = model.Sampler(network, graphs=False), {"prompts": 4, "group size": 4, "steps": 10, "side": 64}

    def sample(sizes):
        grid, t, _ = model.sampling_settings(root, (sizes["side"],) * 2, sizes["steps"])
        images = [(0, i, g) for i in range(sizes["prompts"]) for g in range(sizes["group size"])]
        sampler([encoded[i] for _, i, _ in images], [model.image_generator(0, *key) for key in images], grid, t,
                torch.zeros(len(t) - 1), 2.0)

    kinds = {"base": base, **{f"{name} x {factor}": base | {name: factor * base[name]} for name in base for factor in (2, 4)}}
    seconds = interleaved({kind: lambda sizes=sizes: sample(sizes) for kind, sizes in kinds.items()}, rounds)
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    for kind, value in seconds.items():
        print(f"{kind:<16}{value:>8.3f} s{value / seconds['base']:>8.2f}x")


# ---- rewards -------------------------------------------------------------------------------------------------


def free(images, prompts, sources):
    return [float(np.asarray(image).mean()) for image in images]


def slow(images, prompts, sources):
    """As long as the rollout of a batch."""
    time.sleep(float(os.environ["REWARD_SECONDS"]))
    return free(images, prompts, sources)


def run_quietly(command, **where):
    done = subprocess.run(command, capture_output=True, text=True, **where)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def grpo_seconds(folder, name, rewards, steps, seconds=0.0):
    """Seconds of every step but the first, by part."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--name", name, "--steps", str(steps), "--rollout-batch", str(BATCH),
               "--group-size", "8", "--prompts-per-step", str(BATCH * BATCHES // 8), "--eval-images", "0", "--sample-every", "0",
               "--save-every", "0", "--reward", *rewards]
    environment = os.environ | {"REWARD_SECONDS": str(seconds), "HF_HUB_OFFLINE": "1"}
    run_quietly(command, cwd=folder, env=environment)
    lines = (Path(folder) / "runs" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines[1:]]


def bench_rewards(rounds=3, steps=7):
    """Free, one slow and four slow rewards, interleaved: seconds a step and the share spent waiting."""
    table = {"free": [], "one slow": [], "four slow": []}
    with tempfile.TemporaryDirectory() as folder:
        first = grpo_seconds(folder, "warm-up", [f"r={__file__}:free"], steps)
        pause = float(np.median([line["rollout"] for line in first])) / BATCHES
        for turn in range(rounds):
            for kind, count, function in (("free", 1, "free"), ("one slow", 1, "slow"), ("four slow", 4, "slow")):
                specs = [f"r{i}={__file__}:{function}" for i in range(count)]
                table[kind] += grpo_seconds(folder, f"{kind} {turn}".replace(" ", "-"), specs, steps, pause)
    print(f"a slow reward takes {pause:.2f} s a batch, as long as its rollout; {BATCHES} batches of {BATCH} images a step")
    print(f"{'rewards':<12}{'s/step':>8}{'waiting':>9}{'over free':>11}")
    base = np.median([sum(line.values()) for line in table["free"]])
    for kind, lines in table.items():
        total = np.median([sum(line.values()) for line in lines])
        waiting = np.median([line["reward_wait"] for line in lines])
        print(f"{kind:<12}{total:>8.2f}{waiting:>9.2f}{total / base - 1:>+11.1%}")




# ---- the real size -------------------------------------------------------------------------------------------


def random_network(config, device, dtype):
    """A transformer of this shape whose weights keep the size of what passes through."""
    with torch.device("meta"):
        network = model.FlowTransformer(config).to(dtype)
    network = network.to_empty(device=device).requires_grad_(False)
    for name, param in network.named_parameters():
        if param.ndim == 1:
            param.fill_(0.0 if "text_norm" in name else 1.0)
        else:
            param.normal_(std=param[0].numel() ** -0.5)
    return network


def random_prompt(config, length, seed):
    embeds = torch.randn(length, config["context_in_dim"], generator=torch.Generator().manual_seed(seed))
    return model.Prompt(embeds, [False] * length, [])


def bench_denoise(config, sides, device, batch=8, steps=6, rounds=3, length=128):
    """Seconds of one image's step with guidance: eager, graph, compiled blocks, both; in the same process, same weights."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `setup` does
    dtype, peak = model.compute_dtype(device), model.matmul_peak(device)
    network = random_network(config, device, dtype)
    pair = random_prompt(config, length, 0), random_prompt(config, 10, 1)
    scheduler = model.read_config(TINY / "model" / "scheduler" / "scheduler_config.json")
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {batch} images of a prompt of {length} tokens, guidance 4; "
          f"a matrix product runs at {peak / 1e12:.3g} TFLOP/s\n{'':<28}{'s/image/step':>13}{'share of peak':>15}")
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(network)
        for side in sides:
            grid = (side // 16, side // 16)
            t, states = model.timesteps(scheduler, grid[0] * grid[1], steps), {}
            samplers = {"eager": model.Sampler(network, False), "graph": model.Sampler(network, True)}
            if device.type != "cuda":
                del samplers["graph"]

            def sample(kind):
                generators = [model.image_generator(0, 0, 0, g) for g in range(batch)]
                states[kind] = samplers[kind]([pair] * batch, generators, grid, t, torch.zeros(steps), 4.0)[0]

            seconds = interleaved({kind: lambda kind=kind: sample(kind) for kind in samplers}, rounds)
            work = sum(model.forward_flops(config, grid[0] * grid[1], prompt) for prompt in pair)
            for kind, value in seconds.items():
                value /= steps * batch
                name = f"{side} px, {'compiled, ' * compiled}{kind}"
                print(f"{name:<28}{value:>13.4f}{work / value / peak:>15.1%}")
            if "graph" in states:
                print(f"{side} px: graph and eager differ by {(states['graph'] - states['eager']).abs().max().item():.1e}; "
                      f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB so far at most")


def random_checkpoint(folder, config, vae):
    """A model directory of this shape with random weights, and the tiny world's text encoder and prompts."""
    root = Path(folder) / "model"
    (root / "vae").mkdir(parents=True)
    (root / "transformer").mkdir()
    for name in ("processor", "scheduler", "text_encoder"):
        (root / name).symlink_to(TINY / "model" / name)
    index = {"_class_name": "QwenImage21Pipeline", "_sampling": {"guidance_scale": 4.0}}
    model.write_text(root / "model_index.json", json.dumps(index))
    for name, network in (("transformer", random_network(config, "cpu", torch.bfloat16)), ("vae", model.VAE(vae).to(torch.bfloat16))):
        model.write_text(root / name / "config.json", json.dumps(network.config))
        save_torch_state_dict(network.state_dict(), root / name, filename_pattern=model.WEIGHTS + "{suffix}.safetensors")
    return root


def bench_iteration(config, vae, sides, arguments=(), steps=3):
    """Whole GRPO iterations by grpo.py with a free reward: where the time goes, MFU, peak memory; the last of `steps`."""
    print(f"{'':<28}{'rollout':>9}{'frozen':>9}{'waiting':>9}{'train':>9}{'MFU':>7}{'GiB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        root = random_checkpoint(folder, config, vae)
        for side in sides:
            for flags in ([], ["--compile"]):
                name = "-".join(["run", str(side), *flags])
                command = [sys.executable, str(ROOT / "grpo.py"), "--model", str(root), "--name", name, "--size", str(side), str(side),
                           "--reward", f"r={__file__}:free", "--steps", str(steps), "--eval-images", "0", "--sample-every", "0",
                           "--save-every", "0", *flags, *arguments]
                run_quietly(command, cwd=folder)
                line = json.loads((Path(folder) / "runs" / name / "log.jsonl").read_text().splitlines()[-1])
                parts = "".join(f"{line['seconds'][part]:>9.2f}" for part in ("rollout", "frozen", "reward_wait", "train"))
                shutil.rmtree(Path(folder) / "runs" / name)  # holds a model
                print(f"{f'{side} px {chr(32).join(flags)}':<28}{parts}{line['mfu']:>7.1%}{line['peak_gib'] or math.nan:>8.1f}")



def bench_gpu(part, sides):
    if not torch.cuda.is_available():
        raise SystemExit(f"bench.py {part} needs a CUDA GPU")
    if part == "denoise":
        bench_denoise(REAL, sides, torch.device("cuda", 0))
    else:
        bench_iteration(REAL | {"context_in_dim": 96}, REAL_VAE, sides, ["--prompts-per-step", "2", "--group-size", "8"], steps=2)


# ---- on paper ------------------------------------------------------------------------------------------------


def plan_job(side, edit, micro_batch=None, offload=False, reference=True, judges=0, world=8, prompts=16, group=8, trained=4, text=200):
    """A training run of grpo.py's defaults at the real size, as `plan_memory` sees it."""
    tokens = (side // 16) ** 2
    source = tokens if edit else 0
    latents = 4 * prompts // world * group * tokens * REAL["in_channels"]  # bytes of one fp32 latent of every image of a step
    share = 2 * sum(param.numel() for param in random_shapes(REAL)) // world
    return model.Job(tokens=tokens, batch=8, rows=micro_batch or max(1, 8192 // tokens), pair=2 * source + text + 16, prefix=source + text,
                     kept=latents * (2 * trained + trained * (1 + reference)), encoder=ENCODER, judges=judges, table=judges,
                     parked=share * reference, offload=offload)


def random_shapes(config):
    with torch.device("meta"):
        return list(model.FlowTransformer(config).parameters())


def bench_plan(args, config=REAL, text=200):
    """Least time of one GRPO iteration with hybrid guidance and a KL term: FLOPs over the given FLOP/s; and its memory, by phase, in
    every `Mode` that fits."""
    side, edit = args.size[0], args.edit
    job = plan_job(side, edit, args.micro_batch, args.offload, True, JUDGE * args.judge, args.gpus, args.prompts, args.group_size,
                   args.timesteps, text)
    images, source = args.prompts * args.group_size, job.tokens if edit else 0
    prompt = model.Prompt(torch.empty(0), [False] * text + [True] * (source // 4), [])
    forward, speed = images * model.forward_flops(config, job.tokens, prompt), 1e12 * args.tflops * args.gpus
    passes = {"rollout, guided": 2 * args.sampler_steps, "old and reference velocities": 2 * args.timesteps,
              "training": 3 * args.timesteps, "or training that recomputes activations": 4 * args.timesteps}
    count = sum(param.numel() for param in random_shapes(config))
    print(f"{count:,} parameters on {args.gpus} GPUs at {args.tflops:g} TFLOP/s; {args.prompts} prompts x {args.group_size} images of "
          f"{side} px{', edits of a source of that size' * edit}, {args.sampler_steps} steps, {args.timesteps} trained")
    for part, number in passes.items():
        print(f"  {part:<40}{number * forward / speed:>9.1f} s")
    size = args.gib * 2**30 - model.context_bytes(args.gpus)
    print(f"GiB on a GPU of {args.gib:g}, {model.context_bytes(args.gpus) / 2**30:g} of them CUDA's and NCCL's")
    for mode in model.MODES[::1 if args.judge else 2]:
        most = model.RESERVED * max(model.memory_phases(config, REAL_VAE, args.gpus, job, mode).values())
        print(f"  {most / 2**30:>6.1f} where {', '.join(model.describe(mode)[:2 + args.judge])}")
    mode, phases = model.choose_mode(config, REAL_VAE, args.gpus, job, size)
    print(f"{'; '.join(model.describe(mode)[:2 + args.judge])}\n  {model.in_words(phases)}")
    print(f"{'fits' if model.RESERVED * max(phases.values()) <= size else 'does not fit'} into {args.gib:g}; host memory for all ranks, "
          f"{model.in_words(model.host_bytes(config, args.gpus, job, pinned=True))}")


BENCHES = {"sampler": bench_sampler, "prefix": bench_prefix, "growth": bench_growth, "rewards": bench_rewards}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[*BENCHES, "denoise", "iteration", "plan"])
    add = parser.add_argument_group("denoise, iteration, plan").add_argument
    add("--size", type=int, nargs="+", default=[1024], help="pixels of a side; of plan only one (default: 1024)")
    add = parser.add_argument_group("plan").add_argument
    add("--gpus", type=int, default=8, help="(default: %(default)s)")
    add("--gib", type=float, default=79, help="memory of a GPU (default: %(default)s)")
    add("--tflops", type=float, default=700, help="what a matrix product reaches (default: %(default)s)")
    add("--prompts", type=int, default=16, help="per step (default: %(default)s)")
    add("--group-size", type=int, default=8, help="(default: %(default)s)")
    add("--sampler-steps", type=int, default=40, help="(default: %(default)s)")
    add("--timesteps", type=int, default=4, help="trained (default: %(default)s)")
    add("--micro-batch", type=int, help="rows (default: 8192 tokens of them)")
    add("--edit", action="store_true", help="edits of one source image instead of text-to-image")
    add("--offload", action="store_true", help="as in grpo.py")
    add("--judge", action="store_true", help="with an 8B judge on the GPU")
    args = parser.parse_args()
    if args.bench in BENCHES:
        BENCHES[args.bench]()
    elif args.bench == "plan":
        bench_plan(args)
    else:
        bench_gpu(args.bench, args.size)
