"""Measurements that are too slow or too noisy to be tests. Each prints one table.

    python tests/bench.py sampler    # our denoise loop against diffusers' pipeline, same weights and noise
    python tests/bench.py prefix     # an edit update with the shared prefix against one for every row
    python tests/bench.py growth     # what a step costs by group size, prompts, sampler steps and tokens
    python tests/bench.py rewards    # what slow rewards cost a GRPO step: Sec. 4.1's asynchronous pipeline
    python tests/bench.py judges     # what computing in bf16 does to the tiny scorers
    python tests/bench.py servers    # a run whose remote reward fails in five ways: 10 minutes
    python tests/bench.py gradient   # what each trained step adds to GRPO's gradient
    python tests/bench.py noise      # what its stochastic steps cost the pictures of a rollout
    python tests/bench.py plan --gpus 8 --gib 79 --size 1024    # time and memory of an iteration, on paper

What is compared runs interleaved in one process; tables give medians.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(TINY)]

import model  # before torch: it sets the number of threads
from runs import loaded_rewards
import numpy as np
import torch

BATCH, BATCHES = 16, 4  # images a rollout batch, batches a step
REAL = dict(_class_name="QwenImage21Transformer2DModel", patch_size=1, in_channels=64, out_channels=64,
            num_layers=32,
            attention_head_dim=128, num_attention_heads=32, context_in_dim=4096, mlp_ratio=3,
            axes_dims_rope=[16, 56, 56], eps=1e-6,
            causal_condition=True)  # of Qwen/Qwen-Image-2.1
REAL_VAE = dict(_class_name="AutoencoderKLQwenImage21", base_dim=96, decoder_base_dim=144, z_dim=64,
                dim_mult=[1, 2, 4, 8, 8],
                num_res_blocks=2, temperal_downsample=[False, True, True, True], in_channels=4,
                out_channels=4,
                latents_mean=[0.0] * 64, latents_std=[1.0] * 64)
ENCODER = JUDGE = 17_534_247_392  # bytes of Qwen3-VL-8B in bf16


# ---- the sampler -------------------------------------------------------------------------------------------


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
    """So many prompts of one length: diffusers places the image of a shorter prompt in a padded batch
    differently than alone.
    """
    lengths = {}
    for i, (prompt, _) in encoded.items():
        lengths.setdefault(len(prompt.slots), []).append(i)
    return max(lengths.values(), key=len)[:count]


def bench_sampler(rounds=5, prompts=8, group=8, steps=40, cfg=4.0):
    if not importlib.util.find_spec("diffusers"):
        raise SystemExit("bench.py sampler needs: pip install diffusers==0.42.1")
    from test_diffusers import load_pipeline
    device, requests = torch.device("cpu"), dict(enumerate(model.load_prompts(TINY / "heldout.jsonl")))
    vae, (grid, t, _) = model.load_vae(TINY / "model", device,
                                       torch.float32), model.sampling_settings(TINY / "model", steps=steps)
    encoded = model.encode_prompts(TINY / "model", vae, requests, grid, device)
    chosen = one_length(encoded, prompts)
    images = [(0, i, g) for i in chosen for g in range(group)]
    samplers = {}
    for kind in ("ours", "ours, compiled"):
        network = model.materialise(model.new_transformer(TINY / "model", torch.float32), TINY / "model",
                                    device)
        samplers[kind] = model.Sampler(network.requires_grad_(False), graphs=False)
    model.compile_blocks(network)
    pipeline = load_pipeline(TINY / "model")
    noise = torch.stack([torch.randn(grid[0] * grid[1], 16, generator=model.noise_stream(0, *key))
                         for key in images])
    embeds, mask = pipeline.encode_prompt([requests[i].prompt for i in chosen], num_images_per_prompt=1)[:2]
    empty, empty_mask = pipeline.encode_prompt([" "] * prompts, num_images_per_prompt=1)[:2]

    def theirs(output_type):
        return pipeline(prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=empty,
                        negative_prompt_embeds_mask=empty_mask, num_images_per_prompt=group,
                        true_cfg_scale=cfg, latents=noise.clone(),
                        height=16 * grid[0], width=16 * grid[1], output_resolution=16 * grid[0],
                        sigmas=np.linspace(1, 1 / steps, steps).tolist(), output_type=output_type).images

    def ours(kind):
        generators = [model.noise_stream(0, *key) for key in images]
        return samplers[kind]([encoded[i] for _, i, _ in images], generators, grid, t, torch.zeros(steps),
                              cfg)[0]

    def ours_to_the_end():
        return [image
                for _, batch,
                _ in model.generate(samplers["ours"], vae, encoded, images, grid, t, torch.zeros(steps), cfg,
                                    0,
                                                        len(images)) for image in batch]

    pixels = vae.decode(theirs("latent").mT.unflatten(2, grid))
    for kind in samplers:
        error = (vae.decode(ours(kind).mT.unflatten(2, grid)) - pixels).abs().max() / 2
        print(f"{kind}: largest difference of a pixel {error:.1e} of its range")
    seconds = interleaved({"diffusers": lambda: theirs("latent"),
                           **{kind: lambda kind=kind: ours(kind) for kind in samplers},
                           "diffusers with VAE": lambda: theirs("pil"), "ours with VAE": ours_to_the_end},
                          rounds)
    peak = model.matmul_peak(device)
    work = group * steps * sum(model.forward_flops(network.config, grid[0] * grid[1], prompt)
                               for i in chosen for prompt in encoded[i])
    print(f"{prompts} prompts x {group} images, {steps} steps, guidance {cfg:g}, {torch.get_num_threads()} "
          "thread")
    print(f"{'':<20}{'seconds':>9}{'speed-up':>10}{'share of matmul peak':>22}")
    for kind, value in seconds.items():
        base = seconds["diffusers with VAE" if "VAE" in kind else "diffusers"]
        print(f"{kind:<20}{value:>9.2f}{base / value:>10.2f}{work / value / peak:>22.0%}")
    print(f"the matrix products alone, at {peak / 1e9:.0f} GFLOP/s, take {work / peak:.2f} s")


# ---- the shared prefix -------------------------------------------------------------------------------------


def bench_prefix(rounds=7, group=8, draws=4, micro_batch=32):
    """One edit group's forward and backward passes: G images x 4 timesteps, a source image as large as the
    output.
    """
    device, grid = torch.device("cpu"), model.sampling_settings(TINY / "model")[0]
    requests = {0: model.load_prompts(TINY / "edits.jsonl")[0]}
    vae = model.load_vae(TINY / "model", device, torch.float32)
    prompt, _ = model.encode_prompts(TINY / "model", vae, requests, grid, device)[0]
    network = model.materialise(model.new_transformer(TINY / "model", torch.float32), TINY / "model", device)
    x, target = torch.randn(2, group * draws, grid[0] * grid[1], 16,
                            generator=torch.Generator().manual_seed(0))
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
    print(f"prefix of {model.prefix_tokens(prompt)} tokens ({4 * sum(prompt.slots)} of the source image), "
          f"{grid[0] * grid[1]} target tokens, {group} images x {draws} timesteps; relative difference of "
          f"the gradients {((a - b).norm() / b.norm()).item():.1e}")
    for kind, value in seconds.items():
        print(f"{kind:<12}{1000 * value:>8.1f} ms{seconds['recomputed'] / value:>8.2f}x")


# ---- growth ------------------------------------------------------------------------------------------------


def bench_growth(rounds=3):
    """Seconds of a sampler call when one of its sizes doubles."""
    device, root = torch.device("cpu"), TINY / "model"
    requests = dict(enumerate(model.load_prompts(TINY / "heldout.jsonl")[:16]))
    vae = model.load_vae(root, device, torch.float32)
    encoded = model.encode_prompts(root, vae, requests, (4, 4), device)
    network = model.materialise(model.new_transformer(root, torch.float32), root,
                                device).requires_grad_(False)
    sampler, base = model.Sampler(network, graphs=False), {"prompts": 4, "group size": 4, "steps": 10,
                                                           "side": 64}

    def sample(sizes):
        grid, t, _ = model.sampling_settings(root, (sizes["side"],) * 2, sizes["steps"])
        images = [(0, i, g) for i in range(sizes["prompts"]) for g in range(sizes["group size"])]
        sampler([encoded[i] for _, i, _ in images], [model.noise_stream(0, *key) for key in images], grid,
                t,
                torch.zeros(len(t) - 1), 2.0)

    kinds = {"base": base,
             **{f"{name} x {factor}": base | {name: factor * base[name]} for name in base
                for factor in (2, 4)}}
    seconds = interleaved({kind: lambda sizes=sizes: sample(sizes) for kind, sizes in kinds.items()}, rounds)
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    for kind, value in seconds.items():
        print(f"{kind:<16}{value:>8.3f} s{value / seconds['base']:>8.2f}x")


# ---- rewards -----------------------------------------------------------------------------------------------


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
    command = [sys.executable, str(ROOT / "grpo.py"), "--name", name, "--steps", str(steps),
               "--rollout-batch", str(BATCH),
               "--group-size", "8", "--prompts-per-step", str(BATCH * BATCHES // 8), "--eval-images", "0",
               "--sample-every", "0",
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
            for kind, count, function in (("free", 1, "free"), ("one slow", 1, "slow"),
                                          ("four slow", 4, "slow")):
                specs = [f"r{i}={__file__}:{function}" for i in range(count)]
                table[kind] += grpo_seconds(folder, f"{kind} {turn}".replace(" ", "-"), specs, steps, pause)
    print(f"a slow reward takes {pause:.2f} s a batch, as long as its rollout; {BATCHES} batches of {BATCH} "
          "images a step")
    print(f"{'rewards':<12}{'s/step':>8}{'waiting':>9}{'over free':>11}")
    base = np.median([sum(line.values()) for line in table["free"]])
    for kind, lines in table.items():
        total = np.median([sum(line.values()) for line in lines])
        waiting = np.median([line["reward_wait"] for line in lines])
        print(f"{kind:<12}{total:>8.2f}{waiting:>9.2f}{total / base - 1:>+11.1%}")




# ---- judges ------------------------------------------------------------------------------------------------


def bench_judges(count=256):
    """Scores of drawings in bf16 against those in fp32, with the head's product in fp32, as it is, and in
    bf16.
    """
    import world
    rng = np.random.default_rng(0)
    pictures = [world.degrade(world.draw(world.sample_scene(rng)), rng)[0] for _ in range(count)]
    print(f"{count} drawings\n{'':<12}{'head':<6}{'different scores':>17}{'mean error':>12}{'largest':>9}")
    for name in ("aesthetic", "portrait"):
        (reward,) = loaded_rewards([name], TINY / "model")
        exact, vlm = np.array(reward.score(pictures, [""] * count, [[]] * count)), reward.score.vlm
        print(f"{name:<12}{'fp32':<6}{len(set(exact)):>17}   computing in fp32 throughout")
        vlm.to(torch.bfloat16)
        for head in ("fp32", "bf16"):
            if head == "bf16":
                del vlm.get_output_embeddings().forward  # the module's own
            scores = np.array(reward.score(pictures, [""] * count, [[]] * count))
            error = np.abs(scores - exact)
            print(f"{name:<12}{head:<6}{len(set(scores)):>17}{error.mean():>12.4f}{error.max():>9.4f}")


# ---- servers -----------------------------------------------------------------------------------------------


def bench_servers():
    """grpo.py, six steps of 32 images in four batches, with a remote reward that changes in the third step.
    """
    from judge_server import serve
    from test_rewards import answered
    flags = ["--prompts-per-step", "4", "--rollout-batch", "8", "--eval-images", "0", "--sample-every", "0",
             "--steps", "6", "--name", "run"]
    cases = {"answers": None, "refuses (HTTP 401)": (401, b'{"error": "a key is missing"}'), "takes 2 s": 2,
             "restarts within 60 s": 60,
             "is gone": math.inf, "hangs": 1e6}
    print("| from the third step on the server | seconds | return code | steps | what is printed "
          "|\n|---|---|---|---|---|")
    for name, fault in cases.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
            def answer(number, text, pictures, body):
                if number < 64 or fault is None or name.startswith(("restarts", "is gone")):
                    return answered(pictures[0])
                if isinstance(fault, tuple):
                    return fault
                done.wait(fault)
                return answered(pictures[0])

            done, first = threading.Event(), contextlib.ExitStack()
            server = first.enter_context(serve(answer))
            process = subprocess.Popen([sys.executable, "-u", ROOT / "grpo.py", "--reward",
                                        f"aesthetic={server.url}", *flags], cwd=folder,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            printed = []
            reader = threading.Thread(target=lambda: printed.extend(process.stdout))
            reader.start()
            while len(server.asked) < 64 and process.poll() is None:
                time.sleep(0.01)
            began = time.perf_counter()
            if name.startswith(("restarts", "is gone")):
                first.close()
                if fault < math.inf:
                    time.sleep(fault)
                    servers.enter_context(serve(answer, port=server.server_port))
            process.wait()
            seconds = time.perf_counter() - began
            done.set()
            reader.join()
            first.close()
            log = Path(folder) / "runs" / "run" / "log.jsonl"
            steps = len(log.read_text().splitlines()) if log.exists() else 0
            said = [line.strip()
                    for line in printed
                    if re.match(r"reward aesthetic: http|grpo.py: |python |  \d+ x ", line)]
            print(f"| {name} | {seconds:.0f} | {process.returncode} | {steps} | {'; '.join(said)} |",
                  flush=True)


# ---- the real size -----------------------------------------------------------------------------------------


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


def random_prompt(config, length, seed, source=None):
    """A prompt of so many text tokens, after a source image of `source` = (h, w) latents if there is one."""
    generator = torch.Generator().manual_seed(seed)
    slots = [False] * length
    if source:
        slots[4:4] = [True] * (source[0] * source[1] // 4)
    sources = [torch.randn(config["in_channels"], *source, generator=generator)] if source else []
    return model.EncodedPrompt(torch.randn(len(slots), config["context_in_dim"], generator=generator), slots,
                        sources)


# ---- on paper ----------------------------------------------------------------------------------------------


def plan_job(side, edit, micro_batch=None, offload=False, judges=0, world=8, prompts=16, group=8, latents=16,
             text=200):
    """A training run at the real size with a KL to the reference, as `plan_memory` sees it. latents: how many
    of each image's wait for the updates: states and noises of 4 trained steps, old and reference velocities.
    """
    tokens = (side // 16) ** 2
    source = tokens if edit else 0
    # bytes of one fp32 latent of every image of a step
    one = 4 * prompts // world * group * tokens * REAL["in_channels"]
    share = 2 * sum(param.numel() for param in random_shapes(REAL)) // world
    return model.Job(tokens=tokens, batch=8, micro_batch=micro_batch or max(1, 8192 // tokens),
                     rollout_prefix=2 * source + text + 16, objective_prefix=source + text,
                     kept=one * latents, encoder=ENCODER, judges=judges, table=judges, waiting=share,
                     offload=offload)


def random_shapes(config):
    with torch.device("meta"):
        return list(model.FlowTransformer(config).parameters())


def bench_plan(args, config=REAL, text=200):
    """Least time of one GRPO iteration with hybrid guidance and a KL term: FLOPs over the given FLOP/s; and
    its memory, by phase, in every `Mode` that fits."""
    side, edit = args.size, args.edit
    job = plan_job(side, edit, args.micro_batch, args.offload, JUDGE * args.judge, args.gpus, args.prompts,
                   args.group_size,
                   4 * args.timesteps, text)
    images, source = args.prompts * args.group_size, job.tokens if edit else 0
    prompt = model.EncodedPrompt(torch.empty(0), [False] * text + [True] * (source // 4), [])
    forward, speed = images * model.forward_flops(config, job.tokens, prompt), 1e12 * args.tflops * args.gpus
    passes = {"rollout, guided": 2 * args.sampler_steps, "old and reference velocities": 2 * args.timesteps,
              "training": 3 * args.timesteps, "or training that recomputes activations": 4 * args.timesteps}
    count = sum(param.numel() for param in random_shapes(config))
    print(f"{count:,} parameters on {args.gpus} GPUs at {args.tflops:g} TFLOP/s; {args.prompts} prompts x "
          f"{args.group_size} images of {side} px{', edits of a source of that size' * edit}, "
          f"{args.sampler_steps} steps, {args.timesteps} trained")
    for part, number in passes.items():
        print(f"  {part:<40}{number * forward / speed:>9.1f} s")
    context = model.context_bytes(args.gpus)
    size = args.gib * 2**30 - context - model.SLACK
    print(f"GiB on a GPU of {args.gib:g}, less {context / 2**30:g} for CUDA and NCCL and "
          f"{model.SLACK / 2**30:g} for fragmentation")
    counts = model.parameter_counts(config, REAL_VAE)
    for mode in model.MODES[::1 if args.judge else 2]:
        most = max(model.memory_phases(config, REAL_VAE, counts, args.gpus, job, mode).values())
        print(f"  {most / 2**30:>6.1f} where {', '.join(model.describe(mode)[:2 + args.judge])}")
    mode, phases = model.choose_mode(config, REAL_VAE, args.gpus, job, size)
    print(f"{'; '.join(model.describe(mode)[:2 + args.judge])}\n  {model.in_words(phases)}")
    print(f"{'fits' if max(phases.values()) <= size else 'does not fit'} into {args.gib:g}; host memory for "
          f"all ranks, {model.in_words(model.host_bytes(config, args.gpus, job, cuda=True))}")


# ---- the gradient of GRPO ----------------------------------------------------------------------------------


def bench_gradient(batches=12, prompts=16, group=8, noise_level=0.7):
    """Share of every trained step in the gradient of the first update, on the tiny base and its aesthetic
    reward, as grpo.py weighs the steps and with the weights of Eq. 6 as printed. Energy: mean squared norm of
    a batch's gradient, nearly all of it noise. Signal: mean product of the gradients of two batches, whose
    expectation is the squared norm of the expected gradient."""
    import grpo
    root, device = TINY / "model", torch.device("cpu")
    grid, t, cfg = model.sampling_settings(root)
    trained = grpo.trained_steps("4", len(t) - 1)
    sigma = model.noise_levels(t, trained, noise_level)
    kappa = model.mean_shift(t[:-1], t.diff(), sigma)
    network = model.materialise(model.new_transformer(root, torch.float32), root, device)
    vae, requests = model.load_vae(root, device, torch.float32), model.load_prompts(TINY / "prompts.jsonl")
    (reward,), sampler = loaded_rewards(["aesthetic"], root), model.Sampler(network, False)
    floats = grid[0] * grid[1] * network.config["in_channels"]
    gradients = {k: [] for k in trained}
    for batch in range(batches):
        ids = model.prompt_ids(batch, len(requests), prompts, seed=0)
        encoded = model.encode_prompts(root, vae, {i: requests[i] for i in ids}, (4, 4), device)
        images = [(batch, i, g) for i in ids for g in range(group)]
        _, pictures, states = zip(*model.generate(sampler, vae, encoded, images, grid, t, sigma, cfg, 0, 64,
                                                  trained))
        scores = reward([picture for few in pictures for picture in few], [requests[i] for _, i, _ in images])
        advantage = grpo.group_advantage(torch.tensor([score for score, _ in scores]).view(1, prompts, group),
                                         torch.ones(1, prompts))
        for k in trained:
            x_k, z_k = (torch.cat(parts).split(group) for parts in zip(*(kept[k] for kept in states)))
            for i, x, z, a in zip(ids, x_k, z_k, advantage):
                v = network.velocity(x, t[k].expand(group), network.prefix(encoded[i][:1], grid))
                loss, _ = grpo.grpo_loss(v, v.detach(), z, floats**-0.5, a, 0.1)
                (loss / (prompts * group)).backward()
            gradients[k].append(torch.cat([param.grad.flatten()
                                           for param in network.parameters() if param.grad is not None]))
            network.zero_grad()
    print("| t | kappa | energy | signal | energy as printed | signal as printed |")
    print("|---|---|---|---|---|---|")
    rows = []
    for k in trained:
        g = torch.stack(gradients[k]).double()
        products = g @ g.T                                                                # (batches, batches)
        energy, weight = products.diagonal().mean(), kappa[k].double() ** 2
        signal = (products.sum() - products.trace()) / (batches * (batches - 1))
        rows.append([energy, signal, weight * energy, weight * signal])
    total = torch.tensor(rows).sum(0)
    for k, row in zip(trained, torch.tensor(rows)):
        print(f"| {t[k]:.3f} | {kappa[k]:.3f} | {' | '.join(f'{share:.0%}' for share in row / total)} |")


def bench_noise(levels=(0, 0.7, 1.2), group=12):
    """Oracle scores of held-out pictures drawn by the ODE and with grpo.py's stochastic steps at several
    noise levels, all from the same initial noise."""
    import grpo
    import world
    root, device = TINY / "model", torch.device("cpu")
    grid, t, cfg = model.sampling_settings(root)
    network = model.materialise(model.new_transformer(root, torch.float32), root,
                                device).requires_grad_(False)
    vae, requests = model.load_vae(root, device,
                                   torch.float32), dict(enumerate(model.load_prompts(TINY / "heldout.jsonl")))
    encoded, images = model.encode_prompts(root, vae, requests, (4, 4), device), [(0, i, g) for i in requests
                                                                                  for g in range(group)]
    prompts, first = [requests[i].prompt for _, i, _ in images], None
    print(f"{len(images)} pictures\n| noise level | strict | difference | aesthetic | difference "
          "|\n|---|---|---|---|---|")
    for level in levels:
        sigma = model.noise_levels(t, grpo.trained_steps("4", len(t) - 1), level)
        batches = model.generate(model.Sampler(network, False), vae, encoded, images, grid, t, sigma, cfg, 0,
                                 64)
        pictures = [picture for _, few, _ in batches for picture in few]
        found = [torch.tensor(score(pictures, prompts, [[]] * len(images))).view(-1, group).mean(1)
                 for score in (world.strict_reward, world.aesthetic_reward)]
        first = first or found
        cells = [f"{a.mean():.3f} | {(a - b).mean():+.3f} ± {model.half_interval(a - b):.3f}"
                 for a, b in zip(found, first)]
        print(f"| {level or 'ODE'} | {' | '.join(cells)} |")


BENCHES = {"sampler": bench_sampler, "prefix": bench_prefix, "growth": bench_growth, "rewards": bench_rewards,
           "judges": bench_judges, "servers": bench_servers,
           "gradient": bench_gradient, "noise": bench_noise}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[*BENCHES, "plan"])
    add = parser.add_argument_group("plan").add_argument
    add("--size", type=int, default=1024, help="pixels of a side (default: %(default)s)")
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
    if args.bench == "plan":
        bench_plan(args)
    else:
        BENCHES[args.bench]()
