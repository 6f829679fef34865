"""DiffusionNFT (Sec. 2.2, 4.1, 4.2): good images pull the velocity towards themselves, bad ones push it away.

For each prompt the old policy samples a group of G images by the guided ODE (Eq. 3); score them; normalise
each reward within its group and add them up (Eq. 4, 13); noise the images again (Eq. 1) and regress an
interpolation between old and new velocity to the good ones, and its mirror image to the bad ones (Eq. 7, 8),
with a velocity KL to the base (Eq. 9). No likelihood, no SDE.

    python nft.py --reward aesthetic                                     # tiny model, CPU
    torchrun --nproc_per_node=8 nft.py --model Qwen/Qwen-Image-2.1 --reward aesthetic alignment \\
        --prompts train.jsonl --eval-prompts heldout.jsonl

The run ends with a table: held-out prompts, same seeds, before and after. Everything it leaves is in
runs/NAME/.

Differs from the paper:
  1. The norms of Eq. 8 and 9 are means over dimensions, not sums, so that they do not depend on resolution.
  2. Images are noised at steps of the rollout's own grid (Sec. 4.2's subset), each at --draws of them, one
     from every stratum.
  3. The paper leaves open how the old policy follows. Here theta_old <- d theta_old + (1 - d) theta after
     every step, with d = min(--old-decay, k / (k + 10)) in step k = 0, 1, ...: close behind at first, then
     slower.
  4. Under hybrid CFG (Sec. 4.1) the images come from the guided old policy and all three velocities are
     unguided. What guidance adds to all of a group cancels between its good and bad images.
  5. The paper gives no beta, A_max, KL weight or learning rate. A_max is sqrt(G-1), which no z-score of G
     images exceeds: a smaller one would clip, and the common part of a clipped group would not cancel.
  6. A score that failed is left out and counted, never 0; an image without any has r = 1/2, which prefers
     nothing. One that does not apply is dropped for its group. The paper gives no rule.
  7. A rank owns whole prompt groups, so group statistics need no gathering; the numbers are the same.
The public DiffusionNFT code differs from Eq. 8, which is here as printed: see the README.
The three CFG strategies of Sec. 4.1: as it is, guided rollout and unguided objective (hybrid);
--guided-objective, both; --cfg 1, neither.
"""

import argparse
import math
import time
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

from model import (
    FAILED, RUBRICS, SIDE, STOP, UNDEFINED, ArgumentParser, Clock, Evaluator, Job, Sampler, StopTraining,
    UserError, VLMScorer, all_gather_list, backward_prefixes, bounded, check_disk, check_rewards,
    command_line, compile_blocks, compute_dtype, create_shared, describe_rewards, describe_run, detach_prefix,
    directory_name, encode_prompts, find_model, forward_flops, free_memory, gather_weights, generate,
    guidance_source, guided_velocity, heldout_id, image_side, in_pixels, keep_gathered, latent_shape,
    line_chart, load_checkpoint, load_prompts, load_rewards, load_vae, load_vlms, local_shards,
    longest_prefix, materialise, matmul_peak, network_width, new_transformer, noise_stream, open_run,
    parse_run, plan_memory, prompt_ids, prompts_per_step, rank_share, read_log, reduce_gradients, release,
    resume_command, reward_threads, sampling_settings, save_checkpoint, save_model, seat_judges, setup, shard,
    speed_record, stop_at_once, stop_gently, stopped, stopping, tiny_prompts, to_host, unseat_judges,
    vlm_bytes, weight_bytes, what_now, write_log)
import torch
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tests" / "tiny"
CPU = torch.device("cpu")
BAD_UPDATES = 3  # so many in a row that are not finite stop the run
SAVED_BYTES = 16  # of a checkpoint, per parameter: weights, old policy and Adam's moments in fp32
LEFT_OUT = "not waited for"
LR = 5e-6  # of AdamW at width 4096; Adam's steps should shrink with width

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
        help="directory under runs/ (default: made from rewards, seed and a number)")
    add("--steps", type=bounded(int, 1), default=30, help="rollouts to train on (default: %(default)s)")
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
    add = parser.add_argument_group("rewards").add_argument
    add("--reward", nargs="+", default=[], metavar="R",
        help=f"NAME of {', '.join(RUBRICS)} or identity (the VLM in MODEL/rewards/NAME, else the text "
             "encoder judges zero-shot); NAME=SOURCE with a VLM (directory or hub id), the URL of an "
             "OpenAI-compatible endpoint or file.py:function, each weighing 1/K; or one JSON file with "
             "weights per category (see README)")
    add("--max-reward-failures", type=bounded(float, 0, 1), default=0.05, metavar="SHARE",
        help="stop, before the update, where more of a step's scores failed (default: %(default)s)")
    add("--judge", nargs="+", default=[], metavar="R",
        help="same form; only in the final table, never trained on")
    add = parser.add_argument_group("rollout").add_argument
    add("--prompts-per-step", type=bounded(int, 1), metavar="P",
        help="a multiple of ranks x updates (default: the smallest from 16 on)")
    add("--group-size", type=bounded(int, 2), default=8, metavar="G",
        help="images per prompt (default: %(default)s)")
    add("--size", type=image_side, nargs=2, metavar=("H", "W"),
        help=f"pixels, multiples of {SIDE} (default: the checkpoint's, else 512 512)")
    add("--sampler-steps", type=bounded(int, 2), metavar="T",
        help="default: the checkpoint's sample_sigmas, else 40 (the paper's)")
    add("--cfg", type=bounded(float, 0), metavar="S",
        help="guidance scale of rollout and evaluation, 1 for none (default: the checkpoint's, else 1)")
    add("--guided-objective", action="store_true",
        help="guide the objective as well, through both branches (Sec. 4.1; default: the hybrid, which does "
             "not)")
    add("--train-timesteps", default="half", metavar="STEPS",
        help="sampler steps that images are noised to (Sec. 4.2): a number, spread over the noisier half; "
             "half, all of that; all; or a list as 0,2,3 (default: %(default)s)")
    add("--draws", type=bounded(int, 1), default=4, metavar="N",
        help="of these for every image, stratified (default: %(default)s)")
    add("--rollout-batch", type=bounded(int, 1), metavar="B",
        help="images sampled at once (default: 64 on a CPU, 8 on a GPU)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=bounded(float, 0, above=True), help=f"AdamW (default: {LR:g} x 4096 / width)")
    add("--beta", type=bounded(float, 0, above=True), default=1.0,
        help="interpolation strength of Eq. 7 (default: %(default)s)")
    add("--adv-max", type=bounded(float, 0, above=True), metavar="A",
        help="A_max: clips advantages before they become r (default: sqrt(G-1), the largest that an "
             "advantage can be)")
    add("--old-decay", type=bounded(float, 0, 1), default=0.8, metavar="D",
        help="how much of the old policy a step keeps, once it has settled (default: %(default)s)")
    add("--kl-coef", type=bounded(float, 0), default=0.02, metavar="W",
        help="weight of the velocity KL to the base model, Eq. 9 (default: %(default)s)")
    add("--updates-per-rollout", type=bounded(int, 1), default=2, metavar="U",
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
    args = parse_run(parser, argv, ["reward"], FREE, "name", lambda args: Path("runs", args.name))
    return tiny_prompts(args, TINY, "prompts.jsonl", "heldout.jsonl")


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


# ---- 3. rewards and advantage (same in grpo, nft) ----------------------------------------------------------


class StepScores:
    """The scores of a step's images, which come in while the step goes on. P groups of G images, those of
    this rank.

    weights (K, P) of the K rewards; scores (K, P, G), with FAILED (NaN) where there is no answer, UNDEFINED
    (inf) where the reward does not apply; advantage (P, G); seconds that were spent waiting.
    """

    def __init__(self, rewards, requests, group_size):
        self.rewards, self.group_size = rewards, group_size
        self.weights = torch.tensor([[reward.weigh(request) for request in requests] for reward in rewards])
        self.weights = self.weights.float()                                                # w_k     (K, P)
        self.scores = self.weights.new_full((*self.weights.shape, group_size), FAILED)     # R_k     (K, P, G)
        self.advantage = self.weights.new_zeros(len(requests), group_size)                 # A       (P, G)
        self.pending = []  # (images, K futures) per batch
        self.arrived = []  # K (score, why) per image; why is empty where all went well
        self.seconds, self.reasons = 0.0, Counter()

    def ask(self, pools, images, requests):
        """Have the next images of the rollout scored in the background."""
        futures = [pool.submit(reward, images, requests) for pool, reward in zip(pools, self.rewards)]
        self.pending.append((len(images), futures))

    def wait_for_local(self):
        """Until the VLMs on this machine are done."""
        wait([future for _, futures in self.pending for future, reward in zip(futures, self.rewards)
              if isinstance(reward.score, VLMScorer)])

    def wait_for(self, count):
        """Until the first `count` images have their K (score, why); once STOP is set, what is not there is
        left out.
        """
        began = time.perf_counter()
        while len(self.arrived) < count:
            images, futures = self.pending.pop(0)
            while wait(futures, timeout=0.2).not_done and not STOP.is_set():
                pass
            answers = [future.result() if future.done() else [(FAILED, LEFT_OUT)] * images
                       for future in futures]
            self.arrived += zip(*answers)
        self.seconds += time.perf_counter() - began

    def advantage_of(self, p):
        """A (G,) of group p, once its own scores are there."""
        first, last = p * self.group_size, (p + 1) * self.group_size
        self.wait_for(last)
        self.scores[:, p] = torch.tensor([[score for score, _ in row] for row in self.arrived[first:last]]).T
        self.advantage[p] = group_advantage(self.scores[:, [p]], self.weights[:, [p]])             # Eq. 4, 13
        return self.advantage[p]

    def check(self, limit):
        """Wait for all. Nothing is trained on a step that cannot be trusted: StopTraining on all ranks where
        more than a share `limit` of the scores failed, or where STOP left some out.
        """
        self.wait_for(self.advantage.numel())
        self.reasons = Counter(why for row in self.arrived for _, why in row if why)
        parts = all_gather_list([(self.reasons, (self.weights > 0).sum().item() * self.group_size)])
        reasons, asked = sum((part[0] for part in parts), Counter()), sum(part[1] for part in parts)
        if LEFT_OUT in reasons:
            raise StopTraining
        if reasons.total() > limit * asked:
            table = "".join(f"\n  {count} x {why}" for why, count in reasons.most_common(8))
            raise StopTraining(f"{reasons.total()} of {asked} scores failed, --max-reward-failures is "
                               f"{limit:g}:{table}")


def group_advantage(scores, weights):
    """Rewards to advantages, per prompt group. scores (K, P, G), FAILED or UNDEFINED where there is none;
    weights (K, P) -> A (P, G).

    Each reward is z-scored within its group with the population std. A group whose range is below 1e-4 of its
    largest magnitude carries no preference and contributes 0; a failed score is left out of mean and std, and
    its own share of the advantage is 0. A reward that is undefined for a group is dropped there and the other
    weights make up for it.
    """
    weights = weights.double().where(~(scores == UNDEFINED).any(-1), 0)
    weights = weights / weights.sum(0).where(weights.sum(0) > 0, 1)                        # w_k     (K, P)
    valid = scores.isfinite()
    values = scores.double().where(valid, 0)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = values.sum(-1, keepdim=True) / count                                            # mu_k    (K, P, 1)
    std = (((values - mean) ** 2).where(valid, 0).sum(-1, keepdim=True) / count).sqrt()    # sigma_k (K, P, 1)
    low = values.where(valid, math.inf).amin(-1, keepdim=True)
    high = values.where(valid, -math.inf).amax(-1, keepdim=True)
    differs = valid & (high - low > 1e-4 * values.abs().amax(-1, keepdim=True))
    z = ((values - mean) / std.where(std > 0, 1)).where(differs, 0)                        # Eq. 4   (K, P, G)
    return (weights[:, :, None] * z).sum(0).float()                                        # Eq. 13  (P, G)


def step_record(parts, rewards):
    """A log line's statistics from what every rank gathered in a step; `mean` and `max` hold one value per
    update or timestep.
    """
    scores, weights, advantage = (torch.cat([part[key] for part in parts], dim=d)
                                  for key, d in (("scores", 1), ("weights", 1), ("advantage", 0)))
    found = scores.where(scores.isfinite(), math.nan)                                              # (K, P, G)
    deviation = found - found.nanmean(-1, keepdim=True)
    means, stds = found.nanmean(dim=(1, 2)), deviation.square().nanmean(-1).sqrt().nanmean(1)
    return {
        "reward": {reward.name: mean.item() for reward, mean in zip(rewards, means) if mean.isfinite()},
        "reward_std": {reward.name: std.item() for reward, std in zip(rewards, stds) if std.isfinite()},
        "score_mass": {reward.name: reward.score.mass for reward in rewards if hasattr(reward.score, "mass")},
        "failed": scores.isnan().sum().item(),
        "reasons": dict(sum((part["reasons"] for part in parts), Counter()).most_common(3)),
        "undefined": ((scores == UNDEFINED) & (weights[:, :, None] > 0)).sum().item(),
        "advantage_abs": advantage.abs().mean().item(),
        "constant_groups": (advantage == 0).all(-1).float().mean().item(),
        **{name: [sum(v) / len(v) for v in zip(*(part["mean"][name] for part in parts))]
           for name in parts[0]["mean"]},
        **{name: [max(v) for v in zip(*(part["max"][name] for part in parts))] for name in parts[0]["max"]}}


# ---- 4. loss -----------------------------------------------------------------------------------------------


def optimality(advantage, adv_max):
    """r of Eq. 8: advantages, clipped to [-A_max, A_max], as numbers from 0 to 1."""
    return advantage.clamp(-adv_max, adv_max) / (2 * adv_max) + 0.5                         # (B,)       Eq. 8


def draw_steps(steps, count, generator):
    """`count` of the sampler steps, one from each of as many strata of the list."""
    draws = [int((d + torch.rand((), generator=generator)) * len(steps) / count) for d in range(count)]
    return [steps[min(draw, len(steps) - 1)] for draw in draws]  # d + a number just below 1 rounds to d + 1


def nft_loss(v, v_old, v_target, r, beta):
    """Good images attract, bad ones repel the velocity, one row per (image, timestep). fp32.

    v, v_old  (B, N, C)  the objective's velocities by the trained and the old policy at x_t;  v_target (B, N,
                         C)  eps - x_0
    r         (B,)       Eq. 8: 1 for the best images, 0 for the worst
    Returns the loss summed over the batch.
    """
    v_plus = beta * v + (1 - beta) * v_old                                                # (B, N, C)  Eq. 7
    v_minus = (1 + beta) * v_old - beta * v                                               # (B, N, C)  Eq. 7
    error_plus = (v_plus - v_target).pow(2).mean(dim=(1, 2))                              # (B,)  difference 1
    error_minus = (v_minus - v_target).pow(2).mean(dim=(1, 2))                            # (B,)  difference 1
    return (r * error_plus + (1 - r) * error_minus).sum()                                 # ()         Eq. 8


def kl_loss(v, v_ref):
    """Velocity KL to the reference, mean over dimensions, summed over the batch: (B, N, C) -> ()."""
    return (v - v_ref).pow(2).mean(dim=(1, 2)).sum()                                                   # Eq. 9


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


# ---- 6. setup (same in grpo, nft) --------------------------------------------------------------------------


def set_up(args):
    """A run: the one namespace on which everything below works. Here its processes, its sizes and the
    schedule of its sampler.
    """
    run = SimpleNamespace(args=args, bad=0)
    run.rank, run.world, run.device = setup()
    run.root = find_model(args.model)
    run.policy = new_transformer(run.root, torch.float32)  # its weights are read by `load_models`
    run.config = run.policy.config
    run.grid, run.t, run.cfg = sampling_settings(run.root, args.size, args.sampler_steps, args.cfg)
    run.T = len(run.t) - 1  # sampler steps; t (T+1,)
    run.shape = latent_shape(run.config, run.grid)  # (N, C) of one image
    run.tokens = run.shape[0]
    run.trained = trained_steps(args.train_timesteps, run.T)
    run.branches = 2 if args.guided_objective and run.cfg != 1 else 1  # prompt, and prompt without text
    run.G, run.U = args.group_size, args.updates_per_rollout
    run.lr = LR * 4096 / network_width(run.config) if args.lr is None else args.lr
    on_gpu = run.device.type == "cuda"
    run.batch = args.rollout_batch or (8 if on_gpu else 64)
    run.micro_batch = args.micro_batch or max(1, (8192 if on_gpu else 512) // run.tokens)
    return run


# ---- 7. data (same in grpo, nft) ---------------------------------------------------------------------------


def load_data(run):
    """Prompts, who has which of them in what step, rewards, the run's folder; then the prompts, encoded."""
    args = run.args
    run.requests, run.heldout = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    run.P = args.prompts_per_step = prompts_per_step(args.prompts_per_step, len(run.requests), run.world,
                                                     run.U)
    steps = [prompt_ids(step, len(run.requests), run.P, args.seed) for step in range(args.steps)]
    # update by update: the first len(ids) / U ids of a share are the first update's
    run.shares = [rank_share(ids, run.U, run.rank, run.world) for ids in steps]
    shown = len(run.heldout) if args.eval_images else Evaluator.SHOWN * bool(args.sample_every)
    run.eval_ids = list(range(run.rank, len(run.heldout[:shown]), run.world))
    run.rewards, run.judges = load_rewards(args.reward, run.root), load_rewards(args.judge, run.root)
    check_rewards(run.rewards, run.requests)
    check_rewards(run.judges, run.heldout)
    run.folder = open_run(args, args.reward, run.rank)
    check_disk(run.folder, run.policy, SAVED_BYTES * bool(args.save_every))
    run.vae = load_vae(run.root, run.device, compute_dtype(run.device))
    used = {i: run.requests[i] for share in run.shares for i in share}
    used |= {heldout_id(i): run.heldout[i] for i in run.eval_ids}
    run.encoded = encode_prompts(run.root, run.vae, used, run.grid, run.device)


# ---- 8. schedule, memory, models ---------------------------------------------------------------------------


def make_schedule(run):
    """The micro-batches of a group, which share one prefix. The sampler is the ODE; only its end is kept."""
    args = run.args
    run.sigma, run.keep = torch.zeros(run.T), {run.T}
    run.adv_max = max(1, run.G - 1) ** 0.5 if args.adv_max is None else args.adv_max
    pairs = [(d, g) for d in range(args.draws) for g in range(run.G)]
    run.micro_batches = [pairs[i:i + run.micro_batch] for i in range(0, len(pairs), run.micro_batch)]
    # sum over a micro-batch -> mean over the update; FSDP averages over ranks
    run.scale = run.world / (run.P * run.G * args.draws / run.U)


def plan(run):
    """What the run takes of memory, and so how its updates may treat the network: `run.memory`."""
    args, itemsize = run.args, compute_dtype(run.device).itemsize
    load_vlms(run.rewards + run.judges, run.device)
    run.checkpointing = run.device.type == "cuda" if args.checkpointing is None else args.checkpointing
    latents = 4 * (run.P // run.world) * run.G * math.prod(run.shape)  # bytes of one for every image
    own_params = sum(param.numel() for param in run.policy.parameters()) // run.world  # of a rank
    run.longest = longest_prefix(run.encoded, 1 + (run.cfg != 1))
    run.memory = plan_memory(run.config, run.vae.config, run.device, Job(
        tokens=run.tokens, batch=run.batch, micro_batch=run.micro_batch, rollout_prefix=run.longest,
        objective_prefix=longest_prefix(run.encoded, run.branches),
        kept=latents * args.draws * (3 + bool(args.kl_coef)),  # x, v_target, v_old, v_ref
        encoder=weight_bytes(run.root / "text_encoder"), judges=vlm_bytes(run.rewards),
        table=vlm_bytes(run.rewards + run.judges),
        waiting=own_params * (4 + itemsize * bool(args.kl_coef)),  # old policy, base
        offload=args.offload, checkpointing=run.checkpointing))


def load_models(run):
    """The policy, sharded, and the frozen network: a whole one on every rank, never trained, that
    `gather_weights` turns into the policy (pictures), the old policy (rollout, v_old), then into the base
    (v_ref); for the final table into base and policy.
    """
    args, device, dtype, on_gpu = run.args, run.device, compute_dtype(run.device), run.device.type == "cuda"
    run.frozen = new_transformer(run.root, dtype).to_empty(device=device).requires_grad_(False)
    if args.compile:
        compile_blocks(run.frozen, run.policy)
    run.policy = materialise(shard(run.policy, device, args.offload), run.root,
                             CPU if args.offload else device)
    run.policy.checkpointing = run.checkpointing
    # the base, as no checkpoint is loaded yet
    run.reference = to_host(local_shards(run.policy), dtype) if args.kl_coef else []
    # eps is small because gradients are: the loss is a mean over dimensions
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=run.lr, betas=(0.9, 0.95), eps=1e-10,
                                      weight_decay=0, fused=True)
    run.old = to_host(local_shards(run.policy), torch.float32)  # EMA in fp32: bf16 would lose its drift
    run.start = 0
    if args.resume:
        run.start = load_checkpoint(run.folder / "checkpoint", run.policy, run.optimizer, run.old)
    run.optimizer.param_groups[0]["lr"] = run.lr  # --resume may bring another
    graphs = on_gpu and not args.offload if args.graph is None else args.graph
    run.sampler = Sampler(run.frozen, graphs, run.longest, args.cudnn)
    run.evaluator = Evaluator(run.heldout, run.eval_ids, run.encoded, run.sampler, run.vae, run.grid, run.t,
                              args.seed, run.batch)
    run.pools, run.peak = reward_threads(run.rewards, device), matmul_peak(device)


def describe(run):
    """The header."""
    args = run.args
    images = f"{run.P} prompts x {run.G} images of {in_pixels(run.grid)}"
    describe_run(run.folder, args, run.policy, run.device, images, run.requests, run.heldout)
    print(f"sampler: {run.T} steps, guidance {run.cfg:g} ({guidance_source(run.root, args.cfg)}); "
          f"trained at t = {', '.join(f'{run.t[k]:.3f}' for k in run.trained)}, "
          f"{'guided' if run.branches > 1 else 'unguided'} objective; lr {run.lr:.2g}")
    describe_rewards(run.rewards)


# ---- 9. the parts of a step --------------------------------------------------------------------------------


def roll_out(run, step, ids, scores):
    """Images by the old policy, guided, given to the rewards batch by batch; then noised again,
    group by group.
    """
    keys, kept = [(step, i, g) for i in ids for g in range(run.G)], []
    for chunk, decoded, states in generate(run.sampler, run.vae, run.encoded, keys, run.grid, run.t,
                                           run.sigma, run.cfg, run.args.seed, run.batch, run.keep):
        kept.append(states[run.T][0])
        scores.ask(run.pools, decoded, [run.requests[i] for _, i, _ in chunk])
    x0 = torch.cat(kept).unflatten(0, (len(ids), run.G))                                   # (groups, G, N, C)
    return [noised(run, x0[group], step, i) for group, i in enumerate(ids)]


def noised(run, x0, step, i):
    """A group's images (G, N, C) at D drawn steps: x_t and v = eps - x_0, both (D, G, N, C), and t (D, G, 1,
    1).
    """
    draws = run.args.draws
    generators = [noise_stream(run.args.seed, f"noise {step}", i, g) for g in range(run.G)]
    drawn = torch.tensor([draw_steps(run.trained, draws, generator) for generator in generators]).T   # (D, G)
    eps = torch.stack([torch.randn(draws, *x0.shape[1:], generator=generator) for generator in generators],
                      dim=1).to(run.device)
    t = run.t[drawn][..., None, None].to(run.device)
    return (1 - t) * x0 + t * eps, eps - x0, t                                                         # Eq. 1


def select(run, states, group, micro):
    """x_t, v = eps - x_0 (B, N, C) and t (B, 1, 1) of a micro-batch."""
    d, g = map(list, zip(*micro))
    return [part[d, g] for part in states[group]]


@torch.no_grad()
def frozen_velocities(run, ids, states):
    """Velocities by the frozen network on the very micro-batches that will be trained: {(group, m): v (B, N,
    C)}.
    """
    velocities = {}
    for group, i in enumerate(ids):
        prefixes = [run.frozen.prefix([prompt], run.grid) for prompt in run.encoded[i][:run.branches]]
        for m, micro in enumerate(run.micro_batches):
            x, _, t = select(run, states, group, micro)[:3]
            velocities[group, m] = guided_velocity(run.frozen, x, t.flatten(), *prefixes, cfg=run.cfg)
    return velocities


def train_group(run, group, prompts, states, advantage, v_old, v_ref, sums):
    """Add the gradients of one prompt's images, advantage (G,), to what there is, and losses and shifts to
    `sums`.
    """
    prefixes = [run.policy.prefix([prompt], run.grid) for prompt in prompts]
    leaves = [*map(detach_prefix, prefixes)]
    for m, micro in enumerate(run.micro_batches):
        x, v_target, t = select(run, states, group, micro)
        r = optimality(advantage[[g for _, g in micro]], run.adv_max).to(run.device)           # (B,)
        v = guided_velocity(run.policy, x, t.flatten(), *leaves, cfg=run.cfg)                  # (B, N, C)
        loss = nft_loss(v, v_old[group, m], v_target, r, run.args.beta)
        sums.loss += loss.detach()
        sums.shifts.append((v.detach() - v_old[group, m]).pow(2).mean())
        if run.reference:
            penalty = kl_loss(v, v_ref[group, m])
            sums.kl += penalty.detach()
            loss = loss + run.args.kl_coef * penalty
        (loss * run.scale).backward()
    backward_prefixes(prefixes, leaves)


def update(run, number, ids, states, v_old, v_ref, scores):
    """Optimizer step `number` of this rollout, on its own groups; what is logged of it."""
    # where `plan` found room, whole weights are kept, and gradients reduced once, at the update's end
    keep_gathered(run.policy, run.memory.keep_weights, run.memory.reduce_once)
    zero = torch.zeros((), device=run.device)
    sums = SimpleNamespace(loss=zero.clone(), kl=zero.clone(), shifts=[])
    groups = len(ids) // run.U
    own = range(number * groups, (number + 1) * groups)
    for group in own:
        train_group(run, group, run.encoded[ids[group]][:run.branches], states, scores.advantage_of(group),
                    v_old, v_ref, sums)
    if run.memory.reduce_once:
        reduce_gradients(run.policy)
    if number == 0:  # not before: remote scores come in while gradients are computed
        scores.check(run.args.max_reward_failures)
    norm, stepped = apply_update(run.policy, run.optimizer, sums.loss, run.args.grad_clip)
    if not stepped:
        run.bad += 1
    elif run.bad < BAD_UPDATES:  # so many in a row end the run after this step, whatever follows them
        run.bad = 0
    return statistics(run, sums) | {"grad_norm": norm, "skipped": not stepped}


def statistics(run, sums):
    """Of an update."""
    return {"loss": sums.loss.item() * run.scale, "kl": sums.kl.item() * run.scale,
            "velocity_shift": torch.stack(sums.shifts).mean().sqrt().item()}


def train_step(run, step):
    """Roll out, score, frozen velocities, updates: the step's line of the log; or StopTraining, before the
    first update.
    """
    ids, clock = run.shares[step], Clock(run.device)
    scores = StepScores(run.rewards, [run.requests[i] for i in ids], run.G)

    # roll out by the old policy; a decoded batch is scored in the background from here on
    gather_weights(run.frozen, run.old)
    seat_judges(run.rewards, run.device)
    states = roll_out(run, step, ids, scores)
    clock.lap("rollout")
    if stopping():
        raise StopTraining

    # frozen velocities, on the very micro-batches of training: in the first update v is v_old to the bit
    v_old, v_ref = frozen_velocities(run, ids, states), {}  # by the weights of the rollout
    if run.reference:
        gather_weights(run.frozen, run.reference)
        v_ref = frozen_velocities(run, ids, states)
    clock.lap("frozen")

    # local judges leave before training; other rewards are waited for group by group
    scores.wait_for_local()
    if not run.memory.judges_stay:
        unseat_judges(run.rewards)
    clock.lap("reward_wait")
    if run.device.type == "cuda":
        run.sampler.drop()  # the updates need the memory
    if stopping():  # for the last time: a step that has begun to train is finished
        raise StopTraining

    updates = [update(run, number, ids, states, v_old, v_ref, scores) for number in range(run.U)]
    decay = min(run.args.old_decay, step / (step + 10))                                         # difference 3
    for old, new in zip(run.old, local_shards(run.policy)):
        # on the GPU: the host takes seconds for the 7B
        old.copy_(old.to(run.device).lerp_(new.to(run.device), 1 - decay))
    clock.lap("train")
    return log_line(run, ids, scores, updates, clock.seconds)


def log_line(run, ids, scores, updates, seconds):
    """Of a step, over all ranks."""
    flops = sum(forward_flops(run.config, run.tokens, run.encoded[i][0]) for i in ids) * run.G
    flops *= run.T * (1 + (run.cfg != 1)) + run.branches * run.args.draws * (4 + bool(run.reference))
    seconds["reward_wait"] += scores.seconds
    seconds["train"] -= scores.seconds
    each = {name: [update[name] for update in updates] for name in updates[0]}
    mean = {name: each[name] for name in ("loss", "kl", "velocity_shift")}
    parts = all_gather_list([{
        "scores": scores.scores, "weights": scores.weights, "advantage": scores.advantage,
        "reasons": scores.reasons, "mean": mean, "max": {}, "flops": flops}])
    record, flops = step_record(parts, run.rewards), sum(part["flops"] for part in parts)
    return record | {"grad_norm": each["grad_norm"], "skipped_updates": sum(each["skipped"]),
                     **speed_record(seconds, run.P * run.G, flops, run.peak, run.device)}


def show(run, log, bar):
    """The last line of the log, and the curve."""
    last = log[-1]
    curves = {reward.name: [(line["step"], line["reward"].get(reward.name, math.nan)) for line in log]
              for reward in run.rewards}
    line_chart(run.folder / "curve.png", curves, "mean reward of the rollout", "step")
    bar.set_postfix({name: f"{log[0]['reward'].get(name, math.nan):.2f} -> {value:.2f}"
                     for name, value in last["reward"].items()})
    if last["constant_groups"] == 1:
        tqdm.write(f"step {last['step']}: no group has a preference, its scores are all equal or missing")


def save(run, step, keep=False):
    """A checkpoint after so many steps; `keep` the one before."""
    save_checkpoint(run.folder / "checkpoint", step, run.policy, run.optimizer, run.old, keep)


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


# ---- 11. the end (same in grpo, nft) -----------------------------------------------------------------------


def finish(run):
    """The model, then the last checkpoint, which is larger: a disk that is full by then keeps the model. Then
    the final table.
    """
    args, folder = run.args, run.folder
    save_model(folder / "model", run.root, run.policy, run.cfg, [reward.name for reward in run.rewards])
    if args.save_every and run.start < args.steps:
        save(run, args.steps)
    again = f"; make it: {resume_command(args, f'--name {folder.name}')}" if args.save_every else ""
    stop_at_once(run.rank, f"{folder / 'model'} is complete, the final table is not{again}")
    run.optimizer.state.clear()  # the table needs its memory
    free_memory()
    if args.eval_images:
        judges = run.rewards + run.judges
        seat_judges(judges, run.device)
        run.evaluator.final_table(folder, run.root, local_shards(run.policy), judges, args.eval_images,
                                 {"base": run.cfg, "trained": run.cfg})
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
