"""Reward models (Sec. 3.1): a VLM learns to rate pictures from 1 to 5 on a rubric, from scores or from
preferences.

The VLM answers <score>N</score>, after its reasoning if the data has any; the score is the expectation under
its distribution over the five tokens at N (Eq. 12), regressed to human scores (Eq. 11) or ranked by human
preferences (Eq. 10). The result is an ordinary Hugging Face directory, for `vllm serve` or `grpo.py --reward
NAME=DIRECTORY`, with rubric and answer form in reward.json.

    python train_reward.py --reward aesthetic --data scores.jsonl --out rewards/aesthetic
    torchrun --nproc_per_node=8 train_reward.py --base Qwen/Qwen3-VL-8B-Instruct --lr 2e-6 --reward ...

Data: JSON Lines, paths relative to the file.
  pointwise  {"prompt", "image", "score", "reasoning"?, "source"?, "reward"?}: score is 1 to 5, fractions
             allowed, or an object of dimensions (quality, fidelity, ...), of which the mean is taken; source
             is one path or several, and makes the line a triplet of source, instruction (the prompt) and
             output.
  pairwise   {"prompt", "chosen", "rejected", "source"?, "attributes"?: {"valid", "text_distortion",
             "figure_distortion"}}: a pair with "valid": false is dropped.
"reward" asks under another rubric than --reward; so one VLM can serve several rewards. Either kind can be
--eval-data.

Differs from the paper:
  1. The distribution is renormalised over the five tokens, and a term keeps the probability mass on them;
     where the mass is 1 this is Eq. 12 as printed.
  2. Eq. 10 and 11 are averaged over the batch, not summed.
  3. Scores end at 1 and 5, so R_w - R_l in Eq. 10 is at most 4; --margin-scale multiplies it (1: as printed).
  4. The reasoning, and the form around the score, are learnt by cross-entropy; the paper does not say how.
"""

import argparse
import json
import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from model import (
    FAILED, RUBRICS, ArgumentParser, Processor, UserError, VLMScorer, all_gather_list, as_umask_says, bounded,
    check_keys, check_pictures, claim, command_line, compute_dtype, create_shared, device_memory, download,
    expected_score, find_rubric, free_memory, full_weights, keep_gathered, line_chart, load_checkpoint,
    load_vlm, matmul_peak, on_white, one_rank_at_a_time, open_picture, parse_run, read_config, read_lines,
    read_text, release, remove, resume_command, save_checkpoint, score_text, score_tokens, setup,
    shard_blocks, stop_at_once, stop_gently, stopped, stopping, write_text)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tests" / "tiny" / "model"
KEYS = ("prompt", "image", "score", "chosen", "rejected", "source", "reasoning", "reward", "attributes")
ATTRIBUTES = ("valid", "text_distortion", "figure_distortion")

# what --resume may change
FREE = ("save_every", "eval_data", "micro_batch", "checkpointing", "out", "offload")

# ---- 1. arguments ------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The flags of `argv`, or of the command line, checked."""
    parser = ArgumentParser(__doc__)
    parser.set_defaults(script="train_reward")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", metavar="NAME",
        help=f"which built-in rubric to ask: {', '.join(RUBRICS)}; or any name, with --rubric")
    add("--rubric", metavar="FILE", help="text file with the rubric, {prompt} where the prompt goes")
    add("--data", metavar="FILE", help="scored pictures, or pairs, to train on")
    add("--eval-data", metavar="FILE", nargs="*", default=[], help="held-out scored pictures or pairs")
    add("--out", metavar="DIR", help="directory to write")
    add = parser.add_argument_group("model").add_argument
    add("--base", default=str(TINY / "text_encoder"), metavar="VLM",
        help="directory or hub id to start from, any Qwen-VL (default: the tiny one)")
    add("--processor", metavar="DIR",
        help="its tokenizer and image processor (default: processor/ beside --base, else --base)")
    add("--pixels", type=bounded(int, 1), metavar="N",
        help="enlarge smaller pictures to N pixels (default: as the processor does)")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass (default: on a GPU)")
    add("--offload", action="store_true",
        help="fp32 weights, gradients and Adam in host memory, as one 80 GB card needs for an 8B VLM "
             "(default: on the GPU)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--objective", choices=("pointwise", "pairwise"), default="pointwise",
        help="regression to scores (Eq. 11) or Bradley-Terry on pairs (Eq. 10) (default: %(default)s, the "
             "paper's choice)")
    add("--steps", type=bounded(int, 1), default=400, help="optimizer steps (default: %(default)s)")
    add("--batch", type=bounded(int, 1), default=32,
        help="pictures, or pairs, per step on all ranks (default: %(default)s)")
    add("--micro-batch", type=bounded(int, 1), metavar="B",
        help="pictures, or pairs, per forward (default: 32 on a CPU, 1 on a GPU)")
    add("--lr", type=bounded(float, 0, above=True), default=1e-3,
        help="AdamW, 20 steps of warm-up, linear decay to 0 (default: %(default)s, for the tiny VLM; 2e-6 "
             "for a 7B one)")
    add("--margin-scale", type=bounded(float, 0, above=True), default=1.0, metavar="S",
        help="of R_w - R_l in Eq. 10 (default: %(default)s)")
    add("--mass-coef", type=bounded(float, 0), default=0.1,
        help="weight of -log(mass on the score tokens); 1 overwhelms Eq. 10 (default: %(default)s)")
    add("--answer-coef", type=bounded(float, 0), default=1.0,
        help="weight of the cross-entropy of all other answer tokens (default: %(default)s)")
    add("--grad-clip", type=bounded(float, 0, above=True), default=1.0, metavar="NORM",
        help="gradient norm limit (default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=bounded(int, 0, 10**12), default=0, help="order of the data (default: %(default)s)")
    add("--save-every", type=bounded(int, 0), default=500, metavar="STEPS",
        help="between checkpoints, 0 for none (default: %(default)s)")
    add("--resume", action="store_true",
        help="continue from the last checkpoint in DIR.part, what --out is until it is complete")
    return parse_run(parser, argv, ["reward", "data", "out"], FREE, "out",
                     lambda args: Path(f"{Path(args.out)}.part"))


# ---- 2. data -----------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One picture to be rated. pictures: paths, sources first; score is NaN in a pair."""

    prompt: str
    pictures: list
    reward: str
    score: float = math.nan
    reasoning: str = ""


def load_data(path, reward):
    """Scored pictures [(Example,)] or pairs [(chosen, rejected)], and what to say about them. A bad line is
    named.
    """
    path, rows, notes, places = Path(path), [], Counter(), {}
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
            row = read_record(record, path.parent, record.get("reward", reward), notes)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            wanted = 'want {"prompt", "image", "score"} or {"prompt", "chosen", "rejected"}'
            raise UserError(f"{path}:{number}: {wanted} ({error!r})") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        for example in row or ():
            for picture in example.pictures:
                places.setdefault(picture, f"{path}:{number}")
        check_keys(f"{path}:{number}", record, KEYS)
        rows += [row] if row else []
    if not rows:
        raise UserError(f"{path} holds nothing to learn from")
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"{path} mixes scored pictures and pairs")
    if len({bool(row[0].reasoning) for row in rows}) > 1:
        raise UserError(f"{path}: some lines have reasoning and others have none")
    check_pictures(places)  # one that is not whole is found now, not in the middle of training
    return rows, "".join(f", {note} ({count})" for note, count in notes.items())


def read_record(record, folder, reward, notes):
    """One line -> (Example,), (chosen, rejected), or None for an invalid pair."""
    sources = record.get("source") or []
    sources = [sources] if isinstance(sources, str) else sources
    outputs = [record["image"]] if "image" in record else [record["chosen"], record["rejected"]]
    pictures, before = [folder / name for name in (*sources, *outputs)], [folder / name for name in sources]
    for picture in pictures:
        if not picture.is_file():
            raise ValueError(f"there is no picture {picture}")
    if not isinstance(record["prompt"], str) or not isinstance(record.get("reasoning") or "", str):
        raise TypeError("prompt and reasoning are strings")
    if len(outputs) == 2:
        attributes = record.get("attributes") or {}
        if set(attributes) - set(ATTRIBUTES):
            raise ValueError(f"attributes are {', '.join(ATTRIBUTES)}")
        if not attributes.get("valid", True):
            notes["invalid pairs dropped"] += 1
            return None
        notes.update(f"pairs with {name}".replace("_", " ")
                     for name in ATTRIBUTES[1:] if attributes.get(name))
        if record.get("reasoning"):
            raise ValueError("a pair has no reasoning; only scored pictures do")
        return tuple(Example(record["prompt"], [*before, picture], reward) for picture in pictures[-2:])
    score = record["score"]
    scores = [float(value) for value in (score.values() if isinstance(score, dict) else [score])]
    if not scores or not all(1 <= value <= 5 for value in scores):
        raise ValueError(f"score {score} is not between 1 and 5")
    if isinstance(score, dict):
        notes[f"score = mean of {', '.join(score)}"] += 1
    return (Example(record["prompt"], pictures, reward, sum(scores) / len(scores),
                    record.get("reasoning") or ""),)


def batch_rows(step, count, batch, seed):
    """Row numbers of a step, a function of (seed, step) alone: permutations of the data, one after another.
    """
    first, numbers = step * batch, []
    while len(numbers) < batch:
        epoch, offset = divmod(first + len(numbers), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000003 + epoch))
        numbers += order[offset:offset + batch - len(numbers)].tolist()
    return numbers


def collate(processor, rubrics, examples, device):
    """Model inputs with the whole answer; labels (B, T) of its tokens but the score; place of the score, from
    the end; y (B,).
    """
    tail = "</score>" + processor.tokenizer.eos_token
    place = len(processor.tokenizer(tail, add_special_tokens=False).input_ids) + 1
    texts, answers = [], []
    for example in examples:
        texts.append(score_text(processor.tokenizer, rubrics[example.reward], example.prompt,
                                len(example.pictures), bool(example.reasoning)))
        # only the form after it depends on this token, so that a pair's may be any
        digit = 3 if math.isnan(example.score) else round(example.score)
        thought = f"{example.reasoning}\n" if example.reasoning else ""
        answers.append(f"{thought}<score>{digit}{tail}")
    inputs = processor([text + answer for text, answer in zip(texts, answers)],
                       [on_white(open_picture(path)) for example in examples for path in example.pictures])
    lengths = [len(processor.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
    labels = inputs["input_ids"][:, -max(lengths):].clone()
    for row, length in enumerate(lengths):  # texts are padded on the left, so all answers end together
        labels[row, :-length] = -100
    labels[:, -place] = -100
    y = torch.tensor([example.score for example in examples], device=device)
    return inputs.to(device), labels.to(device), place, y


def copy_processor(folder, out, size):
    """Everything of a VLM directory that is neither weights nor their config, so that servers find what they
    know; if pictures get another `size` than the directory says, that is written down."""
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja",
                           ".txt") and not path.name.endswith(("index.json", "reward.json")):
            if path.name not in ("config.json", "generation_config.json"):
                shutil.copy(path, out)
    for path in (out / "preprocessor_config.json", out / "processor_config.json"):
        config = read_config(path) if path.exists() else {}
        # nested in new ones
        settings = config if path.name == "preprocessor_config.json" else config.get("image_processor")
        if size and settings:
            for older in ("min_pixels", "max_pixels"):  # they would win over the size
                settings.pop(older, None)
            settings["size"] = size
            write_text(path, json.dumps(config, indent=2))


# ---- 3. loss -----------------------------------------------------------------------------------------------


def pointwise_loss(score, y):
    """Regression to human scores, summed over the batch: (B,), (B,) -> ()."""
    return ((score - y) ** 2).sum()                                               # ()    Eq. 11, difference 2


def pairwise_loss(score, margin_scale):
    """Bradley-Terry on (chosen, rejected) pairs one after another, summed: (2B,) -> ()."""
    margin = score[0::2] - score[1::2]                                         # (B,)  R_w - R_l
    return -F.logsigmoid(margin_scale * margin).sum()                          # ()    Eq. 10, difference 2, 3


def mass_loss(logits, tokens):
    """-log of the probability mass on the score tokens, summed over the batch: (B, V) -> ()."""
    logits = logits.float()
    return (logits.logsumexp(-1) - logits[:, tokens].logsumexp(-1)).sum()                 # ()    difference 1


def answer_loss(logits, labels):
    """Cross-entropy of the reasoning and of the form, mean over an answer's tokens, summed: (B, T, V), (B, T)
    -> ().
    """
    tokens = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100,
                             reduction="none")
    return (tokens.unflatten(0, labels.shape).sum(1) / (labels != -100).sum(1)).sum()     # ()    difference 4


# ---- 4. evaluation -----------------------------------------------------------------------------------------


def ranks(values):
    """Ranks of a 1D array, ties averaged."""
    values = np.asarray(values, dtype=np.float64)
    return (np.sort(values).searchsorted(values, "left")
            + np.sort(values).searchsorted(values, "right") - 1) / 2


def correlation(a, b):
    """Pearson correlation; NaN where one side is constant."""
    a, b = np.asarray(a) - np.mean(a), np.asarray(b) - np.mean(b)
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def pair_accuracy(pairs):
    """Share of (better, worse) predictions in the right order, ties counting half; None without pairs."""
    return float(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])) if pairs else None


def rate(scorers, rows, rank, world):
    """Predictions of every example of the rows in their order, by all ranks together: scores (NaN: none),
    mass.
    """
    examples = [example for row in rows for example in row]
    found = []
    for reward in sorted({example.reward for example in examples}):
        mine = [(i, e) for i, e in enumerate(examples) if e.reward == reward][rank::world]
        for first in range(0, len(mine), VLMScorer.BATCH):
            part = mine[first:first + VLMScorer.BATCH]
            pictures = [[open_picture(path) for path in e.pictures] for _, e in part]
            read = scorers[reward].read([p[-1] for p in pictures], [e.prompt for _, e in part],
                                        [p[:-1] for p in pictures])
            found += [(i, FAILED if isinstance(score, Exception) else score, mass)
                      for (i, _), (score, mass, _) in zip(part, read)]
    return np.array([row[1:] for row in sorted(all_gather_list(found))]).T


def statistics(rows, scores, masses):
    """Agreement with the human scores, or with the preferences (n pairs); pictures without a score are
    counted as failed and left out. None where a figure has no meaning."""
    table, valid = {"n": len(rows), "failed": int(np.isnan(scores).sum()),
                    "mass": float(np.mean(masses))}, np.isfinite(scores)
    if not valid.any():
        return table
    if len(rows[0]) == 2:
        pairs = [pair for pair in scores.reshape(-1, 2).tolist() if np.isfinite(pair).all()]
        return table | {"pair_accuracy": pair_accuracy(pairs)}
    truth, groups, within, pairs = np.array([row[0].score for row in rows]), {}, [], []
    for i in np.flatnonzero(valid):
        groups.setdefault((rows[i][0].reward, rows[i][0].prompt, *rows[i][0].pictures[:-1]), []).append(i)
    for g in groups.values():
        within += [correlation(ranks(scores[g]), ranks(truth[g]))] if len(g) > 2 else []
        pairs += [(scores[i], scores[j]) for i in g for j in g if truth[i] > truth[j]]
    scores, truth = scores[valid], truth[valid]
    figures = {
        "srcc": correlation(ranks(scores), ranks(truth)), "plcc": correlation(scores, truth),
        "mae": float(np.abs(scores - truth).mean()), "pair_accuracy": pair_accuracy(pairs),
        "group_srcc": float(np.nanmean(within)) if np.isfinite(within).any() else None, "groups": len(within)}
    return table | {key: None if value is None or math.isnan(value) else value
                    for key, value in figures.items()}


def open_part(args, out, rank):
    """DIR.part, claimed, where everything is written until it is complete, with args.json. Nothing is
    overwritten. All ranks call.
    """
    part, trouble = Path(f"{out}.part"), None
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if (part / "args.json").exists() and not args.resume:
        raise UserError(f"{part} is left from an interrupted run; continue it with --resume, or remove it")
    dist.barrier()  # every rank has looked before rank 0 creates it
    if rank == 0 and not claim(part):
        trouble = f"{part} is being written by another process; choose another --out"
    if trouble := all_gather_list([trouble])[0]:
        raise UserError(trouble)
    create_shared(part)
    if rank == 0:
        write_text(part / "args.json", json.dumps(vars(args), indent=2))
    return part


# ---- 5. setup ----------------------------------------------------------------------------------------------


def set_up(args):
    """A run: the one namespace on which everything below works. Here processes and the VLM's processor."""
    run = SimpleNamespace(args=args, out=Path(args.out))
    run.rank, run.world, run.device = setup()
    run.base = download(args.base)
    beside = run.base.parent / "processor"
    run.processor_folder = run.base
    if args.processor or beside.is_dir():
        run.processor_folder = download(args.processor) if args.processor else beside
    run.processor = Processor(run.processor_folder)
    if args.pixels:
        size = dict(run.processor.image_processor.size)
        run.processor.image_processor.size = size | {"shortest_edge": args.pixels}
    run.tokens = score_tokens(run.processor.tokenizer)
    if args.batch % run.world:
        raise UserError(f"--batch {args.batch} is not a multiple of {run.world} ranks")
    return run


# ---- 6. data -----------------------------------------------------------------------------------------------


def load_examples(run):
    """What is trained on and what is held out, [(example,) or (better, worse)], and the rubrics they ask for.
    """
    args = run.args
    run.train, run.note = load_data(args.data, args.reward)
    run.held_out = {path: load_data(path, args.reward)[0] for path in args.eval_data}
    run.size = {"pointwise": 1, "pairwise": 2}[args.objective]
    run.what = "scored pictures" if run.size == 1 else "pairs"
    if len(run.train[0]) != run.size:
        raise UserError(f"--objective {args.objective}: {args.data} holds "
                        f"{'pairs' if run.size == 1 else 'scored pictures'}")
    if args.rubric and not any(example.reward == args.reward for row in run.train for example in row):
        raise UserError(f"--rubric: no line of {args.data} is about --reward {args.reward}; all name another "
                        "\"reward\"")
    if len({Path(path).name for path in run.held_out}) < len(args.eval_data):
        raise UserError("--eval-data: the files must have different names")
    everything = [example for rows in (run.train, *run.held_out.values()) for row in rows for example in row]
    names = sorted({example.reward for example in everything} | {args.reward})
    run.rubrics = {name: find_rubric(name) for name in names if name != args.reward or not args.rubric}
    if args.rubric:
        run.rubrics[args.reward] = read_text(args.rubric).strip()
    tokenize = run.processor.tokenizer
    longest = max(len(tokenize(row[0].reasoning, add_special_tokens=False).input_ids) for row in run.train)
    run.reasoning = 2 * longest + 16 if longest else 0  # tokens that an answer may have


# ---- 7. model ----------------------------------------------------------------------------------------------


def load_model(run):
    """The VLM, sharded, and its optimizer."""
    args, device = run.args, run.device
    run.part = open_part(args, run.out, run.rank)
    mesh = init_device_mesh(device.type, (run.world,))
    with one_rank_at_a_time():  # it holds all of the VLM until it is sharded
        run.vlm = vlm = load_vlm(run.base, "cpu", torch.float32).requires_grad_(True)
        if device.type == "cuda" if args.checkpointing is None else args.checkpointing:
            vlm.train().gradient_checkpointing_enable({"use_reentrant": False})
        if args.freeze_vision:
            vlm.model.visual.requires_grad_(False)
        run.count = sum(param.numel() for param in vlm.parameters() if param.requires_grad)
        run.room = check_room(run)
        shard_blocks(vlm, [*vlm.model.language_model.layers, *vlm.model.visual.blocks], mesh, args.offload)
    run.trained = [param for param in vlm.parameters() if param.requires_grad]
    # torch's eps of 1e-8 damps parameters whose gradient is that small: of 8B parameters a gradient of norm 1
    # has an rms of 1e-5, many have far less, and all have less as the loss falls
    run.optimizer = torch.optim.AdamW(run.trained, lr=args.lr, betas=(0.9, 0.95), eps=1e-10,
                                      weight_decay=0.01, fused=True)
    run.start = load_checkpoint(run.part / "checkpoint", vlm, run.optimizer) if args.resume else 0
    run.micro_batch = args.micro_batch or (1 if device.type == "cuda" else 32)


def check_room(run):
    """What the masters take of the memory there is, in words; a UserError where they do not fit."""
    offload = run.args.offload
    states = 16 * run.count // run.world
    room = device_memory(torch.device("cpu") if offload else run.device)
    words = (f"{states / 2**30:.1f} GiB of fp32 weights, gradients and Adam a rank, of {room / 2**30:.0f} "
             + ("in host memory" if offload else f"on each {run.device.type}"))
    if states > room:
        raise UserError(f"{words}: --offload keeps them in host memory, more GPUs share them, "
                        "--freeze-vision trains fewer")
    return words


# ---- 8. train ----------------------------------------------------------------------------------------------


def learn(run, examples, last):
    """Add the gradients of a micro-batch, the `last` of its step or not: its loss, and tokens read."""
    args = run.args
    inputs, labels, place, y = collate(run.processor, run.rubrics, examples, run.device)
    logits = run.vlm(**inputs, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits     # (B, T + 1, V)
    logits = logits[:, :-1]                                                                    # (B, T, V)
    score, _ = expected_score(logits[:, -place], run.tokens)                                   # (B,)  Eq. 12
    if args.objective == "pointwise":
        loss = pointwise_loss(score, y)
    else:
        loss = pairwise_loss(score, args.margin_scale)
    form = args.mass_coef * mass_loss(logits[:, -place], run.tokens)
    form = form + args.answer_coef * answer_loss(logits, labels)
    loss = loss + form / run.size
    if last:  # every backward pass reaches the same parameters
        run.vlm.set_requires_gradient_sync(True)
    (loss * run.world / args.batch).backward()  # FSDP averages over ranks
    return loss.item(), inputs["input_ids"].numel()


def train_step(run, step):
    """One optimizer step: the loss of all ranks, the gradient's norm, examples and tokens of this rank."""
    args, rated, read, total = run.args, 0, 0, 0.0
    numbers = batch_rows(step, len(run.train), args.batch, args.seed)[run.rank::run.world]
    if args.offload:  # or every micro-batch would move everything to the GPU and back
        keep_gathered(run.vlm, True, True)
    for first in range(0, len(numbers), run.micro_batch):
        examples = [example for i in numbers[first:first + run.micro_batch] for example in run.train[i]]
        loss, tokens = learn(run, examples, first + run.micro_batch >= len(numbers))
        total += loss / args.batch
        rated, read = rated + len(examples), read + tokens
    total = sum(all_gather_list([total]))
    release(run.vlm)
    norm = torch.nn.utils.clip_grad_norm_(run.trained, args.grad_clip).full_tensor().item()
    if not math.isfinite(total + norm):
        raise UserError(f"step {step}: the loss is {total:g} and the gradient's norm {norm:g}; start again "
                        "with a lower --lr")
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * (1 - step / args.steps) * min(1, (step + 1) / 20)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return total, norm, rated, read


def train(run):
    """All steps; True if they were done, and the run not left before."""
    args, running, rated, read, began = run.args, None, 0, 0, time.perf_counter()
    stop_gently(run.rank)
    bar = tqdm(range(run.start, args.steps), args.reward, args.steps, initial=run.start,
               disable=run.rank > 0, dynamic_ncols=True)
    for step in bar:
        loss, norm, more_rated, more_read = train_step(run, step)
        rated, read = rated + more_rated, read + more_read
        running = loss if running is None else 0.95 * running + 0.05 * loss
        bar.set_postfix(loss=f"{running:.3f}", grad_norm=f"{norm:.2g}",
                        grad_rms=f"{norm / run.count**0.5:.1e}")
        ending, done = stopping(), step + 1
        due = args.save_every and (done % args.save_every == 0 or done == args.steps)
        if ending or due:
            save_checkpoint(run.part / "checkpoint", done, run.vlm, run.optimizer)
        if ending:
            return stopped(args, done, f"--out {args.out}")
    if run.rank == 0 and rated:
        seconds = time.perf_counter() - began
        mfu = 6 * run.count * read / seconds / matmul_peak(run.device)
        print(f"{run.world * rated / seconds:.1f} examples a second, MFU {mfu:.1%} (6 FLOPs per trained "
              "parameter and token)")
    return True


# ---- 9. the end --------------------------------------------------------------------------------------------


def write_scorer(run):
    """The trained VLM in bf16, in `part`, and its processor."""
    weights = full_weights(run.vlm)
    run.vlm = run.optimizer = run.trained = None  # their memory is needed
    free_memory()
    if run.rank == 0:
        plain = load_vlm(run.base, "cpu", torch.bfloat16)
        plain.load_state_dict(weights)
        plain.save_pretrained(run.part)
        as_umask_says(run.part)
        size = dict(run.processor.image_processor.size)
        copy_processor(run.processor_folder, run.part, run.args.pixels and size)
        del plain
        free_memory()


def evaluate(run):
    """Score what was held out, as the scorer will be used: {file: statistics}, and {file: [(human score,
    predicted)]} of scored pictures.
    """
    with one_rank_at_a_time():
        vlm = load_vlm(run.part, run.device, compute_dtype(run.device))
    scorers = {name: VLMScorer(vlm, run.part, rubric, run.reasoning) for name, rubric in run.rubrics.items()}
    tables, dots = {}, {}
    for path, rows in run.held_out.items():
        scores, masses = rate(scorers, rows, run.rank, run.world)
        table = tables[Path(path).name] = statistics(rows, scores, masses)
        if len(rows[0]) == 1:
            dots[Path(path).stem] = [(row[0].score, score) for row, score in zip(rows, scores)]
        if run.rank == 0:
            cells = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in table.items())
            print(f"{Path(path).name}: {'  '.join(cells)}")
    return tables, dots


def finish(run):
    """Write and evaluate the scorer, which then takes its name."""
    args = run.args
    again = f"; continue: {resume_command(args, f'--out {args.out}')}" if args.save_every else ""
    stop_at_once(run.rank, f"trained, but not evaluated{again}")
    write_scorer(run)
    dist.barrier()
    tables, dots = evaluate(run)
    dist.barrier()  # every rank has read what is renamed now
    if run.rank > 0:
        return
    card = {"rubrics": run.rubrics, "reasoning": run.reasoning, "held_out": tables}
    write_text(run.part / "reward.json", json.dumps(card, indent=2))
    line_chart(run.part / "scatter.png", dots, "predicted score", "human score", dots=True)
    remove(run.part / "checkpoint")
    run.part.rename(run.out)
    print(f"wrote {run.out}; in a reward file, behind a server on another machine:")
    for name, rubric in run.rubrics.items():
        entry = {"weight": 1 / len(run.rubrics), "source": "http://HOST:8000/v1", "rubric": rubric,
                 "reasoning": run.reasoning}
        print(f"  {json.dumps(name)}: {json.dumps(entry)}")


def main(argv=None):
    """Train a scorer, write it and evaluate it."""
    run = set_up(parse_args(argv))
    load_examples(run)
    load_model(run)
    if run.rank == 0:
        print(f"{', '.join(run.rubrics)}: {run.count:,} trained parameters, {len(run.train)} {run.what}"
              f"{run.note}, {run.args.steps} steps of {run.args.batch}"
              f"{', with reasoning' if run.reasoning else ''}; {run.room}")
    if train(run):
        finish(run)


if __name__ == "__main__":
    command_line(main)
