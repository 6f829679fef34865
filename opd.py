"""On-policy distillation (Sec. 4.3, App. A): one student learns from a teacher per task, without rewards and
without guidance.

The student samples by the unguided ODE (Eq. 3); at the states it comes through, the teacher of the prompt's
task says where it would go with guidance, and the student learns to go there without (Eq. 14). What guidance
added becomes part of its weights. The error bounds the Wasserstein distance between the images of the two
(Eq. 17), whence squared velocities without any likelihood.

    python opd.py --teacher t2i=runs/T2I/model edit=runs/EDIT/model     # tiny model, CPU, about 5 minutes
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
    STOP, ArgumentParser, Clock, HeldOut, Job, Sampler, UserError, all_gather_list, backward_prefixes,
    bounded, check_disk, check_rewards, command_line, compile_blocks, compute_dtype, create_shared,
    describe_run, detach_prefix, directory_name, encode_prompts, fill, find_model, forward_flops, free_memory,
    guidance_source, guided_velocity, image_grid_png, image_side, keep_gathered, line_chart, load_checkpoint,
    load_prompts, load_rewards, load_vae, load_vlms, load_weights, longest_prefix, materialise, matmul_peak,
    network_width, new_transformer, open_run, own_rows, park, parse_run, plan_memory, prompt_ids,
    prompts_per_step, rank_share, read_config, read_log, reduce_gradients, release, report, resume_command,
    sample, sampling_settings, save_checkpoint, save_model, seat_judges, setup, shard, speed_record,
    stop_at_once, stop_gently, stopped, stopping, synchronize, tiny_prompts, vlm_bytes, weight_bytes,
    write_log)
import torch
from tqdm import tqdm

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parent / "tests" / "tiny"
BAD_UPDATES = 3  # so many in a row that are not finite stop the run
SAVED_BYTES = 12  # of a checkpoint, per parameter: weights and Adam's moments in fp32

# what --resume may change
FREE = ("steps", "save_every", "sample_every", "eval_images", "judge", "rollout_batch", "max_reward_failures",
        "lr", "offload")

# ---- 1. arguments ------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--model", default=str(TINY / "model"), help="model directory or hub id (default: the tiny world)")
    add("--prompts", metavar="FILE",
        help="prompts to train on: JSON Lines, or .txt (default: the tiny world's)")
    add("--eval-prompts", metavar="FILE",
        help="prompts of the grids and of the final table (default: the tiny world's)")
    add("--name", type=directory_name,
        help="directory under runs/ (default: made from tasks, seed and a number)")
    add("--steps", type=bounded(int, 1), default=45, help="rollouts to train on (default: %(default)s)")
    add("--seed", type=bounded(int, 0, 10**12), default=0,
        help="decides prompts, their order and all noise (default: %(default)s)")
    add("--save-every", type=bounded(int, 0), default=50, metavar="STEPS",
        help=f"between checkpoints, {SAVED_BYTES} bytes a parameter each; 0: when stopped only (default: "
             "%(default)s)")
    add("--sample-every", type=bounded(int, 0), default=20, metavar="STEPS",
        help="between image grids, 0 for none (default: %(default)s)")
    add("--eval-images", type=bounded(int, 0), default=450, metavar="N",
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
        help="pixels, multiples of 32 (default: the checkpoint's, else 512 512)")
    add("--sampler-steps", type=bounded(int, 2), metavar="T",
        help="default: the checkpoint's sample_sigmas, else 40 (the paper's)")
    add("--train-timesteps", default="all", metavar="STEPS",
        help="sampler steps that are trained: all; half, the noisier one; a number, spread over that; or a "
             "list as 0,2,3 (default: %(default)s)")
    add("--rollout-batch", type=bounded(int, 1), metavar="B",
        help="images sampled at once (default: 64 on a CPU, 8 on a GPU)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=bounded(float, 0, above=True),
        help="AdamW (default: 2e-5 x 4096 / width, as Adam's steps should shrink with width)")
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
    parser.set_defaults(script="opd")
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
    """What waits for its turn in the slot: this rank's rows in host memory, the guidance scale, and what it
    was trained on.
    """

    rows: list
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
    Returns the loss summed over rows, and the squared error of every row (B,).
    """
    error = (v - v_teacher).pow(2).mean(dim=(1, 2))                                       # (B,)  difference 2
    return (weight * error).sum(), error.detach()                                         # ()         Eq. 14


# ---- 5. update (same in grpo, nft, opd) --------------------------------------------------------------------


DIVERGED = ("step {step}: {bad} updates in a row had a loss or gradient that is not finite (norm {norm}); "
            "none was applied. See log.jsonl and samples/ for what went wrong before; --resume continues "
            "from step {step}, with a lower --lr, or from the checkpoint before if you remove this one")


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


def main(argv=None):
    # ---- 6. setup ------------------------------------------------------------------------------------------
    args = parse_args(argv)
    rank, world, device = setup()
    cuda, dtype = device.type == "cuda", compute_dtype(device)
    root = find_model(args.model)
    policy = new_transformer(root, torch.float32)
    config = policy.config
    grid, t, base_cfg = sampling_settings(root, args.size, args.sampler_steps)
    tokens, T = grid[0] * grid[1], len(t) - 1
    lr = 2e-5 * 4096 / network_width(config) if args.lr is None else args.lr
    micro_batch = args.micro_batch or max(1, (8192 if cuda else 512) // tokens)
    batch = args.rollout_batch or (8 if cuda else 64)
    G, U = args.group_size, args.updates_per_rollout
    trained = trained_steps(args.train_timesteps, T)

    # ---- 7. data -------------------------------------------------------------------------------------------
    requests, heldout = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    P = args.prompts_per_step = prompts_per_step(args.prompts_per_step, len(requests), world, U)
    shares = [rank_share(prompt_ids(step, len(requests), P, args.seed), U, rank, world)
              for step in range(args.steps)]
    eval_ids = list(range(rank, len(heldout), world))
    roots = teacher_roots(args.teacher, requests, args.prompts)
    judges = load_rewards(args.judge, root)
    check_rewards(judges, heldout)
    run = open_run(args, args.teacher, rank)
    check_disk(run, policy, SAVED_BYTES * bool(args.save_every))
    used = {i: requests[i] for share in shares for i in share}
    vae = load_vae(root, device, dtype)
    encoded = encode_prompts(root, vae, used | {("heldout", i): heldout[i] for i in eval_ids}, grid, device)

    # ---- 8. rewards, memory, models ------------------------------------------------------------------------
    load_vlms(judges, device)
    # sum over rows -> mean over the update; FSDP averages over ranks
    scale = world / (P * G * len(trained) / U)
    weight = (t.diff().abs() * T if args.dt_weighting else torch.ones(T)).to(device)                    # (T,)
    # the rows of a group; its micro-batches share one prefix
    pairs = [(k, g) for k in trained for g in range(G)]
    micro_batches = [pairs[i:i + micro_batch] for i in range(0, len(pairs), micro_batch)]
    state_floats = P // world * G * tokens * config["in_channels"]  # of one latent for every image of a step
    longest = longest_prefix(encoded, 2)
    checkpointing = cuda if args.checkpointing is None else args.checkpointing
    own_size = sum(param.numel() for param in policy.parameters()) // world  # parameters, a rank's own rows
    memory = plan_memory(config, vae.config, device, Job(
        tokens=tokens, batch=batch, rows=micro_batch, pair=longest, prefix=longest_prefix(encoded, 1),
        kept=8 * state_floats * len(trained),
        encoder=weight_bytes(root / "text_encoder"), table=vlm_bytes(judges),
        parked=len(roots) * dtype.itemsize * own_size,
        offload=args.offload, checkpointing=checkpointing))

    # the slot: a whole network on every rank, never trained, that `fill` turns into the student for sampling,
    # then teachers
    slot = new_transformer(root, dtype).to_empty(device=device).requires_grad_(False)
    if args.compile:
        compile_blocks(slot, policy)
    policy = materialise(shard(policy, device, args.offload), root, CPU if args.offload else device)
    policy.checkpointing = checkpointing
    teachers = {}
    # through the student's storage: a rank reads and keeps its own rows alone
    for task, teacher in roots.items():
        own = read_config(teacher / "model_index.json").get("_sampling", {})
        guidance = own.get("guidance_scale", 1.0) if args.teacher_cfg is None else args.teacher_cfg
        teacher_rows = park(own_rows(load_weights(policy, teacher / "transformer")), dtype)
        teachers[task] = Teacher(teacher_rows, guidance, own.get("trained_on", []))
    load_weights(policy, root / "transformer")
    # eps is small because gradients are: the loss is a mean over dimensions
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0,
                                  fused=True)
    start = load_checkpoint(run / "checkpoint", policy, optimizer) if args.resume else 0
    optimizer.param_groups[0]["lr"] = lr  # --resume may bring another
    sampler = Sampler(slot, cuda and not args.offload if args.graph is None else args.graph, longest,
                      args.cudnn)
    pictures = HeldOut(heldout, eval_ids, encoded, sampler, vae, grid, t, args.seed, batch)
    peak = matmul_peak(device)
    create_shared(run / "samples")
    if rank == 0:
        describe_run(run, args, policy, device, f"{P} prompts x {G} images of {16 * grid[1]}x{16 * grid[0]}",
                     requests, heldout)
        print(f"sampler: {T} steps, unguided student; trained at t = "
              f"{', '.join(f'{t[k]:.3f}' for k in trained)}; lr {lr:.2g}")
        for task, teacher in teachers.items():
            print(f"teacher {task}: guidance {teacher.cfg:g} "
                  f"({guidance_source(roots[task], args.teacher_cfg, '--teacher-cfg')}); {roots[task]}")

    # ---- 9. the parts of a step ----------------------------------------------------------------------------
    def rows(states, group, micro):
        """x (B, N, C) and t (B,) of a micro-batch."""
        return torch.stack([states[k][group, g] for k, g in micro]), t[[k for k, _ in micro]].to(device)

    def roll_out(step, ids):
        """The student's own unguided trajectory, {k: x (groups, G, N, C)} of the trained steps; nothing is
        decoded.
        """
        images = [(step, i, g) for i in ids for g in range(G)]
        ode = torch.zeros(T)
        batches = sample(sampler, encoded, images, grid, t, ode, 1.0, args.seed, batch, trained)
        states = [kept for *_, kept in batches]
        return {k: torch.cat([kept[k][0] for kept in states]).unflatten(0, (len(ids), G)) for k in trained}

    @torch.no_grad()
    def teacher_velocities(task, ids, states):
        """Guided velocities by the task's teacher, in the slot, on the very micro-batches that will be
        trained: {(group, m): v}.
        """
        velocities, cfg = {}, teachers[task].cfg
        for group in (group for group, i in enumerate(ids) if requests[i].task == task):
            prefixes = [slot.prefix([prompt], grid) for prompt in encoded[ids[group]][:2 if cfg != 1 else 1]]
            for m, micro in enumerate(micro_batches):
                velocities[group, m] = guided_velocity(slot, *rows(states, group, micro), *prefixes, cfg=cfg)
        return velocities

    def train_group(group, prompt, states, v_teacher, sums):
        """Add the gradients of one prompt's images to what there is, and losses and errors to `sums`."""
        prefix = policy.prefix([prompt], grid)
        leaves = detach_prefix(prefix)
        for m, micro in enumerate(micro_batches):
            v = policy.velocity(*rows(states, group, micro), leaves)                      # (B, N, C) unguided
            loss, error = opd_loss(v, v_teacher[group, m], weight[[k for k, _ in micro]])
            sums.errors.append(error)
            sums.loss += loss.detach()
            (loss * scale).backward()
        backward_prefixes([prefix], [leaves])

    def leave(step):
        """End before a step."""
        if step > start:
            save_checkpoint(run / "checkpoint", step, policy, optimizer)
        stopped(args, step, f"--name {run.name}")

    # ---- 10. train -----------------------------------------------------------------------------------------
    def train():
        """All steps; True if they were done, and the run not left before."""
        log, bad = read_log(run / "log.jsonl", start) if args.resume else [], 0
        stop_gently(rank)
        bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0,
                   dynamic_ncols=True)
        for step in bar:
            fill(slot, own_rows(policy))
            if args.sample_every and step % args.sample_every == 0:
                pictures.save_grid(run / "samples" / f"{step:06d}.png", 1.0)
            ids, clock = shares[step], Clock(device)

            # roll out by the student
            states = roll_out(step, ids)
            clock.lap("rollout")

            # the teachers take the slot in turn; every rank loads those that any rank needs
            v_teacher, swap_seconds = {}, 0.0
            for task in sorted({requests[i].task for i in prompt_ids(step, len(requests), P, args.seed)},
                               reverse=True):
                began = time.perf_counter()
                fill(slot, teachers[task].rows)
                synchronize(device)
                swap_seconds += time.perf_counter() - began
                v_teacher |= teacher_velocities(task, ids, states)
            clock.lap("teachers")
            if cuda:
                sampler.drop()  # the updates need the memory
            if stopping():  # nothing of this step has been trained
                return leave(step)

            # updates, each on its own groups
            errors, losses, norms, skipped, groups = [], [], [], 0, len(ids) // U
            for update in range(U):
                # with room, weights stay gathered and gradients are reduced once, at the update's end
                keep_gathered(policy, memory.gathered, memory.once)
                sums = SimpleNamespace(loss=torch.zeros((), device=device), errors=errors)
                for group in range(update * groups, (update + 1) * groups):
                    train_group(group, encoded[ids[group]][0], states, v_teacher, sums)
                if memory.once:
                    reduce_gradients(policy)
                norm, stepped = apply_update(policy, optimizer, sums.loss, args.grad_clip)
                bad, skipped = 0 if stepped else bad + 1, skipped + (not stepped)
                if bad == BAD_UPDATES:
                    save_checkpoint(run / "checkpoint", step, policy, optimizer, keep=True)
                    raise UserError(DIVERGED.format(step=step, bad=bad, norm=norm))
                losses.append(sums.loss.item() * scale)
                norms.append(norm)
            clock.lap("train")

            # one line a step
            flops = sum(forward_flops(config, tokens, encoded[i][0]) for i in ids)
            guided = sum(forward_flops(config, tokens,
                                       encoded[i][0]) * (1 + (teachers[requests[i].task].cfg != 1))
                         for i in ids)
            flops = G * ((T + 3 * len(trained)) * flops + len(trained) * guided)
            seconds = {"rollout": clock.seconds["rollout"],
                       "teachers": clock.seconds["teachers"] - swap_seconds, "swap": swap_seconds,
                       "train": clock.seconds["train"]}
            # per group and trained step
            error = torch.cat(errors).view(len(ids), len(trained), G).mean(2).tolist()
            parts = all_gather_list([{"error": [(requests[i].task, row) for i, row in zip(ids, error)],
                                      "loss": losses, "flops": flops,
                                      "stop": STOP.is_set()}])
            found = [pair for part in parts for pair in part["error"]]
            by_task = {task: [sum(column) / len(column)
                              for column in zip(*(row for of, row in found if of == task))]
                       for task in teachers}
            log.append({"step": step,
                        "loss": [sum(v) / world for v in zip(*(part["loss"] for part in parts))],
                        "velocity_error": by_task,
                        "grad_norm": norms, "skipped_updates": skipped,
                        **speed_record(seconds, P * G, sum(part["flops"] for part in parts), peak, device)})
            if rank == 0:
                write_log(run / "log.jsonl", log, new=step == start)
                curves = {task: [(line["step"], sum(line["velocity_error"][task]) / len(trained))
                                 for line in log
                                 if line["velocity_error"][task]] for task in teachers}
                line_chart(run / "curve.png", curves, "velocity error to the teacher on the student's states",
                           "step")
                bar.set_postfix({task: f"{sum(error) / len(error):.4f}"
                                 for task, error in by_task.items() if error})
            if any(part["stop"] for part in parts):
                return leave(step + 1)
            if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                save_checkpoint(run / "checkpoint", step + 1, policy, optimizer)
        return True

    if not train():
        return

    # the model before the last checkpoint, which is larger: a disk that is full by then keeps the model
    save_model(run / "model", root, policy, 1.0,
               [name for teacher in teachers.values() for name in teacher.trained_on])
    if args.save_every and start < args.steps:
        save_checkpoint(run / "checkpoint", args.steps, policy, optimizer)
    again = f"; make it: {resume_command(args, f'--name {run.name}')}" if args.save_every else ""
    stop_at_once(rank, f"{run / 'model'} is complete, the final table is not{again}")

    # ---- 11. the final table -------------------------------------------------------------------------------
    optimizer.state.clear()  # the table needs its memory
    free_memory()
    if args.eval_images:
        number = math.ceil(args.eval_images / len(heldout))
        seat_judges(judges, device)
        load_weights(slot, root / "transformer")
        before, pictures_before = pictures.scores(judges, number, base_cfg)
        fill(slot, own_rows(policy))
        after, pictures_after = pictures.scores(judges, number, 1.0)
        if rank == 0:
            title = (f"{len(heldout)} held-out prompts x {number} images, base with guidance {base_cfg:g}, "
                     "student without, same seeds")
            if judges:
                report(run, judges, before, after, title)
            image_grid_png(run / "samples" / "before_after.png", pictures_before[:pictures.SHOWN],
                           pictures_after[:pictures.SHOWN], titles=("base", "student"))
    if rank == 0:
        print(f"curve: {run / 'curve.png'}   pictures: {run / 'samples'}   model: {run / 'model'}")


if __name__ == "__main__":
    command_line(main)
