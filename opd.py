"""On-policy distillation (Sec. 4.3, App. A): one student learns from a teacher per task, without rewards and
without guidance.

The student samples by the unguided ODE (Eq. 3); at the states it comes through, the teacher of the prompt's
task says where it would go with guidance, and the student learns to go there without (Eq. 14). What guidance
added becomes part of its weights. The error bounds the Wasserstein distance between the images of the two
(Eq. 17), whence squared velocities without any likelihood.

    python opd.py --teacher t2i=runs/T2I/model edit=runs/EDIT/model     # tiny model, CPU
    torchrun --nproc_per_node=8 opd.py --model Qwen/Qwen-Image-2.1 --teacher t2i=DIR edit=DIR \\
        --prompts mixed.jsonl --eval-prompts heldout.jsonl

The run ends with pictures and, with --judge, a table: held-out prompts, same seeds, the guided base before,
the unguided student after. Everything it leaves is in runs/NAME/.

Differs from the paper:
  1. Eq. 14 sums n = 1 .. N, which has no velocity at t_N and leaves t_0 = 1 out. Here it is the states t_0 ..
     t_{N-1} at which the student's velocity was used.
  2. The squared norm and the sum over n are means, so that the learning rate depends neither on resolution
     nor on N.
  3. No gradient flows through the trajectory: states are sampled first and trained on afterwards. The paper
     says "saved".
  4. Eq. 18 integrates over t where Eq. 14 and 19 sum; --dt-weighting weighs every state by its step's |dt|,
     as Eq. 18 does.
  5. The paper gives neither learning rate nor batch.
"""

import argparse
import math
import time
from typing import NamedTuple
from pathlib import Path
from types import SimpleNamespace

from model import (
    SIDE, ArgumentParser, Clock, Evaluator, Job, Sampler, StopTraining, UserError, all_gather_list,
    backward_prefixes, bounded, check_disk, check_rewards, command_line, compile_blocks, compute_dtype,
    create_shared, describe_run, detach_prefix, directory_name, encode_prompts, find_model, forward_flops,
    free_memory, gather_weights, guidance_source, guided_velocity, heldout_id, image_side, in_pixels,
    keep_gathered, latent_shape, line_chart, load_checkpoint, load_prompts, load_rewards, load_vae, load_vlms,
    load_weights, local_shards, longest_prefix, materialise, matmul_peak, network_width, new_transformer,
    open_run, parse_run, plan_memory, prompt_ids, prompts_per_step, rank_share, read_config, read_log,
    reduce_gradients, release, resume_command, sample, sampling_settings, save_checkpoint, save_model,
    seat_judges, setup, shard, speed_record, stop_at_once, stop_gently, stopped, stopping, synchronize,
    tiny_prompts, to_host, vlm_bytes, weight_bytes, what_now, write_log)
import torch
from tqdm import tqdm

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parent / "tests" / "tiny"
BAD_UPDATES = 3  # so many in a row that are not finite stop the run
SAVED_BYTES = 12  # of a checkpoint, per parameter: weights and Adam's moments in fp32
LR = 2e-5  # of AdamW at width 4096; Adam's steps should shrink with width

# what --resume may change
FREE = ("steps", "save_every", "sample_every", "eval_images", "judge", "rollout_batch", "max_reward_failures",
        "lr", "offload")

# ---- 1. arguments ------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The flags of `argv`, or of the command line, checked."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--model", default=str(TINY / "model"), help="model directory or hub id (default: the tiny world)")
    add("--prompts", metavar="FILE",
        help="prompts to train on: JSON Lines, or .txt (default: the tiny world's)")
    add("--eval-prompts", metavar="FILE",
        help="prompts of the sample pictures and of the final table (default: the tiny world's)")
    add("--name", type=directory_name,
        help="directory under runs/ (default: made from tasks, seed and a number)")
    add("--steps", type=bounded(int, 1), default=90, help="rollouts to train on (default: %(default)s)")
    add("--seed", type=bounded(int, 0, 10**12), default=0,
        help="decides prompts, their order and all noise (default: %(default)s)")
    add("--save-every", type=bounded(int, 0), default=50, metavar="STEPS",
        help=f"between checkpoints, {SAVED_BYTES} bytes a parameter each; 0: when stopped only (default: "
             "%(default)s)")
    add("--sample-every", type=bounded(int, 0), default=20, metavar="STEPS",
        help="between sample pictures, 0 for none (default: %(default)s)")
    add("--eval-images", type=bounded(int, 0), default=300, metavar="N",
        help="held-out images in the final table, 0 for no table (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run --name from its last checkpoint")
    add = parser.add_argument_group("teachers").add_argument
    add("--teacher", nargs="+", default=[], metavar="TASK=DIR",
        help="for every task of the prompts (t2i, edit, or what `task` says) the model of its teacher: "
             "directory or hub id")
    add("--teacher-cfg", type=bounded(float, 0), metavar="S",
        help="guidance scale of all teachers (default: each checkpoint's own, else 1)")
    add("--judge", nargs="+", default=[], metavar="R", help="rewards of the final table, as in grpo.py")
    add = parser.add_argument_group("rollout").add_argument
    add("--prompts-per-step", type=bounded(int, 1), metavar="P",
        help="a multiple of ranks x updates (default: the smallest from 16 on)")
    add("--group-size", type=bounded(int, 1), default=4, metavar="G",
        help="images per prompt (default: %(default)s)")
    add("--size", type=image_side, nargs=2, metavar=("H", "W"),
        help=f"pixels, multiples of {SIDE} (default: the checkpoint's, else 512 512)")
    add("--sampler-steps", type=bounded(int, 2), metavar="T",
        help="default: the checkpoint's sample_sigmas, else 40 (the paper's)")
    add("--train-timesteps", default="all", metavar="STEPS",
        help="sampler steps that are trained: all; half, the noisier one; a number, spread over that; or a "
             "list as 0,2,3 (default: %(default)s)")
    add("--rollout-batch", type=bounded(int, 1), metavar="B",
        help="images sampled at once (default: 64 on a CPU, 8 on a GPU)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=bounded(float, 0, above=True), help=f"AdamW (default: {LR:g} x 4096 / width)")
    add("--dt-weighting", action="store_true",
        help="weigh every state by its step's |dt| (Eq. 18; default: equally, Eq. 14)")
    add("--updates-per-rollout", type=bounded(int, 1), default=1, metavar="U",
        help="optimizer steps per rollout, each on its own prompts (default: %(default)s)")
    add("--micro-batch", type=bounded(int, 1), metavar="B",
        help="(image, timestep) pairs per forward (default: 512 tokens of them on a CPU, 8192 on a GPU)")
    add("--grad-clip", type=bounded(float, 0, above=True), default=1.0, metavar="NORM",
        help="gradient norm limit (default: %(default)s)")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass (default: on a GPU)")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="replay the sampler step as a CUDA graph (default: on a GPU, but not with --offload, whose "
             "page-locked memory a capture would free)")
    add("--compile", action="store_true",
        help="fuse the elementwise work of the blocks, in rollout and training (default: do not)")
    add("--cudnn", action="store_true",
        help="cuDNN's attention in the sampler, and in a local judge at work meanwhile (default: flash "
             "attention)")
    add("--offload", action="store_true",
        help="fp32 weights, gradients and Adam in host memory, as one 80 GB card needs for the 7B (default: "
             "on the GPU)")
    parser.set_defaults(script=Path(__file__).stem)
    args = parse_run(parser, argv, ["teacher"], FREE, "name", lambda args: Path("runs", args.name))
    return tiny_prompts(args, TINY, "mixed.jsonl", "heldout.jsonl")


# ---- 2. timesteps (same in grpo, nft, opd) -----------------------------------------------------------------


def trained_steps(spec, total):
    """--train-timesteps -> indices of sampler steps: a number of them over the noisier half, ends included;
    that half; all; a list.
    """
    half = max(1, total // 2)
    if spec in ("half", "all"):
        return list(range(half if spec == "half" else total))
    words = spec.rstrip(",").split(",")
    steps = [int(word) for word in words if word.strip().isdecimal()]
    if len(steps) == len(words) and "," in spec and max(steps) < total:
        return sorted(set(steps))
    if len(steps) == len(words) and "," not in spec and 1 <= steps[0] <= half:
        apart = (half - 1) / max(1, steps[0] - 1)
        return [round(i * apart) for i in range(steps[0])]
    raise UserError(f"--train-timesteps {spec}: want 1 to {half}, half of the {total} sampler steps; "
                    "half; all; or a list as 0,2")


# ---- 3. teachers -------------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """What waits for its turn in the frozen network: this rank's shards in host memory, the guidance scale,
    and what it was trained on.
    """

    shards: list
    cfg: float
    trained_on: list


def teacher_roots(specs, requests, where):
    """--teacher values -> {task: directory}, one for every task of the prompts."""
    roots = {}
    for task, _, name in (spec.partition("=") for spec in specs):
        if not name or task in roots:
            raise UserError(f"--teacher {' '.join(specs)}: want TASK=DIR for different tasks, as t2i=DIR "
                            "edit=DIR")
        roots[task] = find_model(name)
    missing = {request.task for request in requests} - roots.keys()
    if missing:
        raise UserError(f"{where} has {' and '.join(sorted(missing))} prompts, but there is no --teacher "
                        f"{missing.pop()}=DIR")
    if unused := roots.keys() - {request.task for request in requests}:
        raise UserError(f"--teacher {unused.pop()}=...: no prompt of {where} is of that task")
    return {task: roots[task] for task in sorted(roots, reverse=True)}  # in the order of a prompt file


# ---- 4. loss -----------------------------------------------------------------------------------------------


def opd_loss(v, v_teacher, weight):
    """Velocity matching on the student's own states, one row per (image, timestep). fp32.

    v          (B, N, C)  unguided velocity of the student;  v_teacher (B, N, C)  guided velocity of its
                          task's teacher
    weight     (B,)       1 (Eq. 14), or N |dt| (Eq. 18)
    Returns the loss summed over the batch, and the squared error of each (B,).
    """
    error = (v - v_teacher).pow(2).mean(dim=(1, 2))                                       # (B,)  difference 2
    return (weight * error).sum(), error.detach()                                         # ()         Eq. 14


# ---- 5. update (same in grpo, nft, opd) --------------------------------------------------------------------


DIVERGED = ("{bad} updates in a row had a loss or gradient that is not finite; none was applied. See "
            "log.jsonl and samples/ for what went wrong before. To go on take a lower --lr{more}, "
            "or the checkpoint before, if there is one, by removing this one")


def apply_update(policy, optimizer, loss, grad_clip):
    """Clip the gradient and step, unless it or the loss is not finite on some rank: (gradient norm, whether
    it stepped).
    """
    release(policy)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip).full_tensor()
    finite = all(all_gather_list([bool(norm.isfinite() and loss.isfinite())]))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), finite


# ---- 6. setup ----------------------------------------------------------------------------------------------


def set_up(args):
    """A run: the one namespace on which everything below works. Here its processes, its sizes and the
    schedule of its sampler.
    """
    run = SimpleNamespace(args=args, bad=0)
    run.rank, run.world, run.device = setup()
    run.root = find_model(args.model)
    run.policy = new_transformer(run.root, torch.float32)  # its weights are read by `load_models`
    run.config = run.policy.config
    run.grid, run.t, run.base_cfg = sampling_settings(run.root, args.size, args.sampler_steps)
    run.cfg = 1.0  # the student's
    run.T = len(run.t) - 1  # sampler steps; t (T+1,)
    run.shape = latent_shape(run.config, run.grid)  # (N, C) of one image
    run.tokens = run.shape[0]
    run.trained = trained_steps(args.train_timesteps, run.T)
    run.G, run.U = args.group_size, args.updates_per_rollout
    run.lr = LR * 4096 / network_width(run.config) if args.lr is None else args.lr
    on_gpu = run.device.type == "cuda"
    run.batch = args.rollout_batch or (8 if on_gpu else 64)
    run.micro_batch = args.micro_batch or max(1, (8192 if on_gpu else 512) // run.tokens)
    return run


# ---- 7. data -----------------------------------------------------------------------------------------------


def load_data(run):
    """Prompts, who has which of them in what step, teachers, the run's folder; then the prompts, encoded."""
    args = run.args
    run.requests, run.heldout = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    run.P = args.prompts_per_step = prompts_per_step(args.prompts_per_step, len(run.requests), run.world,
                                                     run.U)
    run.steps = [prompt_ids(step, len(run.requests), run.P, args.seed) for step in range(args.steps)]
    run.shares = [rank_share(ids, run.U, run.rank, run.world) for ids in run.steps]
    shown = len(run.heldout) if args.eval_images else Evaluator.SHOWN * bool(args.sample_every)
    run.eval_ids = list(range(run.rank, len(run.heldout[:shown]), run.world))
    run.roots = teacher_roots(args.teacher, run.requests, args.prompts)
    run.judges = load_rewards(args.judge, run.root)
    check_rewards(run.judges, run.heldout)
    run.folder = open_run(args, args.teacher, run.rank)
    check_disk(run.folder, run.policy, SAVED_BYTES * bool(args.save_every))
    run.vae = load_vae(run.root, run.device, compute_dtype(run.device))
    used = {i: run.requests[i] for share in run.shares for i in share}
    used |= {heldout_id(i): run.heldout[i] for i in run.eval_ids}
    run.encoded = encode_prompts(run.root, run.vae, used, run.grid, run.device)


# ---- 8. schedule, memory, models ---------------------------------------------------------------------------


def make_schedule(run):
    """Weights of the sampler's steps, and the micro-batches of a group, which share one prefix."""
    weight = run.t.diff().abs() * run.T if run.args.dt_weighting else torch.ones(run.T)
    run.weight = weight.to(run.device)                                                                  # (T,)
    pairs = [(k, g) for k in run.trained for g in range(run.G)]
    run.micro_batches = [pairs[i:i + run.micro_batch] for i in range(0, len(pairs), run.micro_batch)]
    # sum over a micro-batch -> mean over the update; FSDP averages over ranks
    run.scale = run.world / (run.P * run.G * len(run.trained) / run.U)


def plan(run):
    """What the run takes of memory, and so how its updates may treat the network: `run.memory`."""
    args, itemsize = run.args, compute_dtype(run.device).itemsize
    load_vlms(run.judges, run.device)
    run.checkpointing = run.device.type == "cuda" if args.checkpointing is None else args.checkpointing
    latents = 4 * (run.P // run.world) * run.G * math.prod(run.shape)  # bytes of one for every image
    own_params = sum(param.numel() for param in run.policy.parameters()) // run.world  # of a rank
    run.longest = longest_prefix(run.encoded, 2)
    run.memory = plan_memory(run.config, run.vae.config, run.device, Job(
        tokens=run.tokens, batch=run.batch, micro_batch=run.micro_batch, rollout_prefix=run.longest,
        objective_prefix=longest_prefix(run.encoded, 1),
        kept=latents * len(run.trained) * 2,  # x, v_teacher
        encoder=weight_bytes(run.root / "text_encoder"), table=vlm_bytes(run.judges),
        waiting=own_params * len(run.roots) * itemsize,  # the teachers
        offload=args.offload, checkpointing=run.checkpointing))


def load_models(run):
    """The student, sharded, and the frozen network: a whole one on every rank, never trained, that
    `gather_weights` turns into the student for sampling, then into the teachers.
    """
    args, device, dtype, on_gpu = run.args, run.device, compute_dtype(run.device), run.device.type == "cuda"
    run.frozen = new_transformer(run.root, dtype).to_empty(device=device).requires_grad_(False)
    if args.compile:
        compile_blocks(run.frozen, run.policy)
    run.policy = materialise(shard(run.policy, device, args.offload), run.root,
                             CPU if args.offload else device)
    run.policy.checkpointing = run.checkpointing
    run.teachers = {task: load_teacher(run, root, dtype) for task, root in run.roots.items()}
    load_weights(run.policy, run.root / "transformer")
    # eps is small because gradients are: the loss is a mean over dimensions
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=run.lr, betas=(0.9, 0.95), eps=1e-10,
                                      weight_decay=0, fused=True)
    run.start = load_checkpoint(run.folder / "checkpoint", run.policy, run.optimizer) if args.resume else 0
    run.optimizer.param_groups[0]["lr"] = run.lr  # --resume may bring another
    graphs = on_gpu and not args.offload if args.graph is None else args.graph
    run.sampler = Sampler(run.frozen, graphs, run.longest, args.cudnn)
    run.evaluator = Evaluator(run.heldout, run.eval_ids, run.encoded, run.sampler, run.vae, run.grid, run.t,
                              args.seed, run.batch)
    run.peak = matmul_peak(device)


def load_teacher(run, root, dtype):
    """Through the student's storage: a rank reads and keeps its own shards alone."""
    own = read_config(root / "model_index.json").get("_sampling", {})
    cfg = own.get("guidance_scale", 1.0) if run.args.teacher_cfg is None else run.args.teacher_cfg
    shards = to_host(local_shards(load_weights(run.policy, root / "transformer")), dtype)
    return Teacher(shards, cfg, own.get("trained_on", []))


def describe(run):
    """The header."""
    images = f"{run.P} prompts x {run.G} images of {in_pixels(run.grid)}"
    describe_run(run.folder, run.args, run.policy, run.device, images, run.requests, run.heldout)
    print(f"sampler: {run.T} steps, unguided student; trained at t = "
          f"{', '.join(f'{run.t[k]:.3f}' for k in run.trained)}; lr {run.lr:.2g}")
    for task, teacher in run.teachers.items():
        source = guidance_source(run.roots[task], run.args.teacher_cfg, "--teacher-cfg")
        print(f"teacher {task}: guidance {teacher.cfg:g} ({source}); {run.roots[task]}")


# ---- 9. the parts of a step --------------------------------------------------------------------------------


def roll_out(run, step, ids):
    """The student's own unguided trajectory, {k: x (groups, G, N, C)} of the trained steps; nothing is
    decoded.
    """
    keys = [(step, i, g) for i in ids for g in range(run.G)]
    batches = sample(run.sampler, run.encoded, keys, run.grid, run.t, torch.zeros(run.T), run.cfg,
                     run.args.seed, run.batch, run.trained)
    states = [kept for *_, kept in batches]
    return {k: torch.cat([kept[k][0] for kept in states]).unflatten(0, (len(ids), run.G))
            for k in run.trained}


def select(run, states, group, micro):
    """x (B, N, C) and t (B,) of a micro-batch."""
    x = torch.stack([states[k][group, g] for k, g in micro])
    return x, run.t[[k for k, _ in micro]].to(run.device)


@torch.no_grad()
def teacher_velocities(run, task, ids, states):
    """Guided velocities by the task's teacher on the very micro-batches that will be trained:
    {(group, m): v (B, N, C)}.
    """
    velocities, cfg = {}, run.teachers[task].cfg
    for group in (group for group, i in enumerate(ids) if run.requests[i].task == task):
        branches = run.encoded[ids[group]][:2 if cfg != 1 else 1]
        prefixes = [run.frozen.prefix([prompt], run.grid) for prompt in branches]
        for m, micro in enumerate(run.micro_batches):
            x, t = select(run, states, group, micro)
            velocities[group, m] = guided_velocity(run.frozen, x, t, *prefixes, cfg=cfg)
    return velocities


def train_group(run, group, prompt, states, v_teacher, sums):
    """Add the gradients of one prompt's images to what there is, and losses and errors to `sums`."""
    prefix = run.policy.prefix([prompt], run.grid)
    leaves = detach_prefix(prefix)
    for m, micro in enumerate(run.micro_batches):
        x, t = select(run, states, group, micro)
        v = run.policy.velocity(x, t, leaves)                                             # (B, N, C) unguided
        loss, error = opd_loss(v, v_teacher[group, m], run.weight[[k for k, _ in micro]])
        sums.loss += loss.detach()
        sums.errors.append(error)
        (loss * run.scale).backward()
    backward_prefixes([prefix], [leaves])


def update(run, number, ids, states, v_teacher):
    """Optimizer step `number` of this rollout, on its own groups; what is logged of it."""
    # where `plan` found room, whole weights are kept, and gradients reduced once, at the update's end
    keep_gathered(run.policy, run.memory.keep_weights, run.memory.reduce_once)
    sums = SimpleNamespace(loss=torch.zeros((), device=run.device), errors=[])
    groups = len(ids) // run.U
    for group in range(number * groups, (number + 1) * groups):
        train_group(run, group, run.encoded[ids[group]][0], states, v_teacher, sums)
    if run.memory.reduce_once:
        reduce_gradients(run.policy)
    norm, stepped = apply_update(run.policy, run.optimizer, sums.loss, run.args.grad_clip)
    if not stepped:
        run.bad += 1
    elif run.bad < BAD_UPDATES:  # so many in a row end the run after this step, whatever follows them
        run.bad = 0
    error = torch.cat(sums.errors).view(groups, len(run.trained), run.G).mean(2)
    return {"loss": sums.loss.item() * run.scale, "error": error, "grad_norm": norm, "skipped": not stepped}


def train_step(run, step):
    """Roll out, teachers' velocities, updates: the step's line of the log. StopTraining before the first
    update.
    """
    ids, clock = run.shares[step], Clock(run.device)

    # roll out by the student
    gather_weights(run.frozen, local_shards(run.policy))
    states = roll_out(run, step, ids)
    clock.lap("rollout")

    # the teachers take the frozen network in turn; every rank loads those that any rank needs
    v_teacher, swap_seconds = {}, 0.0
    for task in sorted({run.requests[i].task for i in run.steps[step]}, reverse=True):
        began = time.perf_counter()
        gather_weights(run.frozen, run.teachers[task].shards)
        synchronize(run.device)
        swap_seconds += time.perf_counter() - began
        v_teacher |= teacher_velocities(run, task, ids, states)
    clock.lap("teachers")
    clock.seconds["teachers"] -= swap_seconds
    clock.seconds["swap"] = swap_seconds
    if run.device.type == "cuda":
        run.sampler.drop()  # the updates need the memory
    if stopping():
        raise StopTraining

    updates = [update(run, number, ids, states, v_teacher) for number in range(run.U)]
    clock.lap("train")
    return log_line(run, ids, updates, clock.seconds)


def log_line(run, ids, updates, seconds):
    """Of a step, over all ranks."""
    forward = [forward_flops(run.config, run.tokens, run.encoded[i][0]) for i in ids]
    by_teachers = [1 + (run.teachers[run.requests[i].task].cfg != 1) for i in ids]
    flops = run.G * sum(each * (run.T + len(run.trained) * (3 + branches))
                        for each, branches in zip(forward, by_teachers))
    errors = torch.cat([update["error"] for update in updates]).tolist()
    parts = all_gather_list([{"error": [(run.requests[i].task, error) for i, error in zip(ids, errors)],
                              "loss": [update["loss"] for update in updates], "flops": flops}])
    found = [pair for part in parts for pair in part["error"]]
    by_task = {}
    for task in run.teachers:
        columns = zip(*(error for of, error in found if of == task))
        by_task[task] = [sum(column) / len(column) for column in columns]
    return {"loss": [sum(v) / run.world for v in zip(*(part["loss"] for part in parts))],
            "velocity_error": by_task, "grad_norm": [update["grad_norm"] for update in updates],
            "skipped_updates": sum(update["skipped"] for update in updates),
            **speed_record(seconds, run.P * run.G, sum(part["flops"] for part in parts), run.peak,
                           run.device)}


def show(run, log, bar):
    """The last line of the log, and the curve."""
    curves = {task: [(line["step"], sum(line["velocity_error"][task]) / len(run.trained)) for line in log
                     if line["velocity_error"][task]] for task in run.teachers}
    line_chart(run.folder / "curve.png", curves, "velocity error to the teacher on the student's states",
               "step")
    bar.set_postfix({task: f"{sum(error) / len(error):.4f}"
                     for task, error in log[-1]["velocity_error"].items() if error})


def save(run, step, keep=False):
    """A checkpoint after so many steps; `keep` the one before."""
    save_checkpoint(run.folder / "checkpoint", step, run.policy, run.optimizer, keep=keep)


# ---- 10. train (same in grpo, nft, opd) --------------------------------------------------------------------


def leave(run, step, trouble="", keep=False):
    """End before a step, saved: asked to, or as a UserError because of what went wrong. keep: the checkpoint
    before as well.
    """
    where = f"--name {run.folder.name}"
    if step > run.start:
        save(run, step, keep)
    if trouble:
        raise UserError(f"stopped before step {step}: {trouble}\n{resume_command(run.args, where)}")
    stopped(run.args, step, where)


def train(run):
    """All steps; True if they were done, and the run not left before."""
    args, log = run.args, read_log(run.folder / "log.jsonl", run.start) if run.args.resume else []
    stop_gently(run.rank)
    bar = tqdm(range(run.start, args.steps), str(run.folder), args.steps, initial=run.start, unit="step",
               disable=run.rank > 0, dynamic_ncols=True)
    for step in bar:
        if args.sample_every and step % args.sample_every == 0:
            gather_weights(run.frozen, local_shards(run.policy))
            run.evaluator.save_samples(run.folder / "samples" / f"{step:06d}.png", run.cfg)
        try:
            log.append({"step": step, **train_step(run, step)})
        except StopTraining as reason:  # without words where the user asked for it
            return leave(run, step, str(reason))
        if run.rank == 0:
            write_log(run.folder / "log.jsonl", log, new=step == run.start)
            show(run, log, bar)
        if run.bad >= BAD_UPDATES:
            more = " and more --steps" if step + 1 == args.steps else ""
            return leave(run, step + 1, DIVERGED.format(bad=run.bad, more=more), keep=True)
        if stopping():
            return leave(run, step + 1)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save(run, step + 1)
    return True


# ---- 11. the end -------------------------------------------------------------------------------------------


def finish(run):
    """The model, then the last checkpoint, which is larger: a disk that is full by then keeps the model. Then
    the final table.
    """
    args, folder = run.args, run.folder
    trained_on = [name for teacher in run.teachers.values() for name in teacher.trained_on]
    save_model(folder / "model", run.root, run.policy, run.cfg, trained_on)
    if args.save_every and run.start < args.steps:
        save(run, args.steps)
    again = f"; make it: {resume_command(args, f'--name {folder.name}')}" if args.save_every else ""
    stop_at_once(run.rank, f"{folder / 'model'} is complete, the final table is not{again}")
    run.optimizer.state.clear()  # the table needs its memory
    free_memory()
    if args.eval_images:
        seat_judges(run.judges, run.device)
        run.evaluator.final_table(folder, run.root, local_shards(run.policy), run.judges, args.eval_images,
                                 {"base": run.base_cfg, "student": run.cfg})
    if run.rank == 0:
        what_now(folder, args)


def main(argv=None):
    """Train, write the model, judge it on held-out prompts."""
    run = set_up(parse_args(argv))
    load_data(run)
    make_schedule(run)
    plan(run)
    load_models(run)
    create_shared(run.folder / "samples")
    if run.rank == 0:
        describe(run)
    if train(run):
        finish(run)


if __name__ == "__main__":
    command_line(main)
