"""Draw groups of images, score them, and work with the scores: curation, calibration, comparison (Sec. 4.2,
5).

    python rollout.py "a red circle above a blue square"          # look at what a checkpoint draws
    python rollout.py --prompts prompts.jsonl --reward aesthetic alignment --name base

Images and scores go to rollouts/NAME/ as they are made, a labelled grid at the end; the same command
continues an interrupted job and tries scores that failed again. Everything else is a function of
rollouts.jsonl, one line an image, and draws nothing:

    python rollout.py --curate rollouts/base --out curated.jsonl  # prompts whose images differ (Sec. 4.2)
    python rollout.py --calibrate rollouts/base                   # before choosing reward weights
    python rollout.py --compare base=rollouts/base rl=rollouts/rl # Table 1 and Fig. 4

An image depends on model, sampler, prompt and its place in the file (edits come last), seed and number alone.
For one --rollout-batch that holds bit for bit on a CPU, for any number of images and ranks: a batch holds one
prompt and is always full.

Differs from the paper:
  1. The composite reward of curation is the weighted sum of the rewards, each scaled by its declared range.
     The paper does not say how rewards compose outside training, where Eq. 13 makes every group's spread the
     same.
  2. Votes come from rewards, not from people: of two images of one prompt and seed the higher score wins, a
     near tie counts half for both. A judge that a checkpoint was trained on is marked.
  3. The paper gives no threshold for curation. Here it is half of every category's prompts, those of the
     largest ranges, so that the mix of categories stays; or what exceeds --min-range.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

from model import (
    FEW, SIDE, UNDEFINED, ArgumentParser, Request, Sampler, UserError, bounded, check_rewards, command_line,
    compute_dtype, contact_sheet, create_shared, directory_name, encode_prompts, find_model, forward_flops,
    generate, guidance_source, half_interval, image_side, in_pixels, load_prompts, load_rewards, load_vae,
    load_vlms, longest_prefix, materialise, matmul_peak, new_transformer, open_picture, read_config,
    reward_threads, sampling_settings, seat_judges, setup, write_text)
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tests" / "tiny"
ELO = 400 / math.log(10)  # rating points per unit of log-odds
PRIOR = 2.0  # std of the prior on ratings, in log-odds: keeps a checkpoint that never loses finite

# ---- 1. arguments ------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The flags of `argv`, or of the command line, checked."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("draw").add_argument
    add("prompt", nargs="*", help="prompts, or instructions with --source")
    add("--prompts", metavar="FILE", help="prompt file: JSON Lines, or .txt")
    add("--source", nargs="+", default=[], metavar="FILE", help="source images that every PROMPT edits")
    add("--model", default=str(TINY / "model"), help="model directory or hub id (default: the tiny world)")
    add("--group-size", type=bounded(int, 1), default=8, metavar="G",
        help="images per prompt (default: %(default)s)")
    add("--size", type=image_side, nargs=2, metavar=("H", "W"),
        help=f"pixels, multiples of {SIDE} (default: the checkpoint's, else 512 512)")
    add("--sampler-steps", type=bounded(int, 2), metavar="T",
        help="default: the checkpoint's sample_sigmas, else 40")
    add("--cfg", type=bounded(float, 0), metavar="S",
        help="guidance scale (default: the checkpoint's, else 1)")
    add("--seed", type=bounded(int, 0, 10**12), default=0, help="decides all noise (default: %(default)s)")
    add("--rollout-batch", type=bounded(int, 1), metavar="B",
        help="images sampled at once (default: the group size, at most 8)")
    add("--reward", nargs="+", default=[], metavar="R", help="score the images; the same forms as in grpo.py")
    add("--name", type=directory_name, help="directory under rollouts/ (default: a number)")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="replay the sampler step as a CUDA graph (default: on a GPU)")
    add("--cudnn", action="store_true", help="cuDNN's attention in the sampler (default: flash attention)")
    add = parser.add_argument_group("use what was drawn and scored").add_argument
    add("--curate", nargs="+", metavar="DIR",
        help="write the prompts whose images differ in composite reward")
    add("--min-range", type=bounded(float, -1, 1), metavar="X",
        help="keep a prompt if its largest minus its smallest composite exceeds X, 0 to 1")
    add("--quantile", type=bounded(float, 0, 1), default=0.5, metavar="Q",
        help="without --min-range: drop this share of every category's prompts, those of the smallest "
             "ranges, and all of range 0 (default: %(default)s)")
    add("--calibrate", nargs="+", metavar="DIR",
        help="print how the rewards relate within groups, per category")
    add("--compare", nargs="+", metavar="NAME=DIR",
        help="checkpoints drawn with the same prompts and seed; the first is the base")
    add("--vote", default="composite", metavar="R",
        help="reward that decides the pairwise votes (default: %(default)s)")
    add("--tie", type=bounded(float, 0), default=0.02, metavar="X",
        help="votes closer than X standard deviations are ties (default: %(default)s)")
    add("--out", metavar="PATH",
        help="what --curate (default: curated.jsonl) or --compare (default: compared/) writes")
    return parser.parse_args(argv)


# ---- 2. records --------------------------------------------------------------------------------------------


def composite(scores, rewards, category):
    """Weighted sum of one image's scores {name: number}, each scaled to [0, 1] by its reward's range
    (difference 1). An undefined reward is dropped and the others make up for it; None where one failed or
    none is left."""
    total = mass = 0.0
    for reward in rewards:
        weight, score = reward.categories.get(category, reward.weight), scores[reward.name]
        if weight and score != UNDEFINED:
            low, high = reward.range
            total, mass = total + weight * (score - low) / (high - low), mass + weight
    return total / mass if mass and math.isfinite(total) else None


def read_records(path):
    """The lines of a rollouts.jsonl, or of the directory that holds it, by prompt and image, each with its
    `folder`.

    A last line that was cut off is dropped with a notice; any other bad line is an error that names it.
    """
    path = Path(path) / "rollouts.jsonl" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}; draw it with rollout.py --prompts FILE --reward R")
    records, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records += [record
                        | {"folder": path.parent, "id": int(record["id"]), "image": int(record["image"])}]
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a line of rollout.py ({error!r})") from None
            print(f"{path}:{number}: the last line was cut off; dropped")
    return sorted(records, key=lambda record: (record["id"], record["image"]))


def read_all(paths):
    """Records of several rollouts as one, their prompts numbered through."""
    records, first = [], 0
    for part in map(read_records, paths):
        records += [record | {"id": record["id"] + first} for record in part]
        first = records[-1]["id"] + 1 if records else 0
    return records


def by_prompt(records):
    """The first record of every prompt, in the order of the rows of `score_array`."""
    return [record for _, record in sorted({record["id"]: record for record in reversed(records)}.items())]


def reward_names(records):
    """The rewards of scored records and, last, the composite."""
    names = list(dict.fromkeys(name for record in records for name in record.get("rewards", ())))
    if not names:
        raise UserError("these images were not scored; give --reward when they are drawn")
    return [*names, "composite"]


def score_array(records, name):
    """Scores by one reward, or the composite: (P, G), NaN where there is none."""
    row = {record["id"]: i for i, record in enumerate(by_prompt(records))}
    scores = np.full((len(row), 1 + max(record["image"] for record in records)), np.nan)
    for record in records:
        score = record["composite"] if name == "composite" else record["rewards"].get(name)
        scores[row[record["id"]], record["image"]] = np.nan if score is None else score
    return scores


def category_rows(records):
    """{category: rows of `score_array`}."""
    rows = {}
    for i, record in enumerate(by_prompt(records)):
        rows.setdefault(record["category"], []).append(i)
    return rows


def table_rows(records):
    """`category_rows` under a first one, "all"; nothing else if there is one category."""
    rows = category_rows(records)
    everything = {"all": sorted(sum(rows.values(), []))}
    return everything | rows if len(rows) > 1 else everything


def group_ranges(scores):
    """Largest minus smallest score of each group (Sec. 4.2); NaN with fewer than two scores: (P, G) -> (P,).
    """
    valid = np.isfinite(scores)
    high, low = (f(np.where(valid, scores, worst), axis=1)
                 for f, worst in ((np.max, -np.inf), (np.min, np.inf)))
    return np.where(valid.sum(1) > 1, high - low, np.nan)


def digits(x, form=".3f"):
    """A number of a table, or a dash where there is none."""
    return "-" if x is None or not np.isfinite(x) else format(x, form)


def mean(x):
    """Mean of what is there; NaN of nothing."""
    x = np.asarray(x, dtype=float)
    return x[np.isfinite(x)].mean() if np.isfinite(x).any() else np.nan


def markdown(header, rows):
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def score_table(records):
    """Per category and reward: how many images have a score, mean, spread, mean range within a group."""
    lines = []
    for category, rows in table_rows(records).items():
        for name in reward_names(records):
            scores = score_array(records, name)[rows]
            found = scores[np.isfinite(scores)]
            if len(found):
                lines.append([category, name, f"{len(found)}/{scores.size}", digits(found.mean()),
                              digits(found.std()),
                              digits(mean(group_ranges(scores)))])
    return markdown(["category", "reward", "scored", "mean", "std", "mean range in a group"], lines)


# ---- 3. curation and calibration (Sec. 4.2) ----------------------------------------------------------------


def curate(records, min_range, quantile):
    """Prompts whose intra-group range of the composite exceeds `min_range` or, if that is None, is among the
    largest of their category: all but a share `quantile` of its prompts, of equal ranges those with the
    larger std, and none of range 0.

    Returns the ranges (P,) and whether each prompt is kept (P,).
    """
    reward_names(records)  # an error if nothing was scored
    scores = score_array(records, "composite")
    ranges = group_ranges(scores)
    std = np.array([np.std(row[np.isfinite(row)]) if np.isfinite(row).any() else 0 for row in scores])
    keep = np.zeros(len(ranges), bool)
    for rows in category_rows(records).values():
        rows = np.array(rows)
        order = np.lexsort((-std[rows], -ranges[rows]))  # by range, then by std; NaN comes last
        largest = rows[order][:len(rows) - math.floor(quantile * len(rows))]
        keep[largest if min_range is None else rows] = True
    return ranges, keep & (ranges > (0 if min_range is None else min_range))


def write_curated(records, ranges, keep, out):
    """The kept prompts as a prompt file, each with its range and its mean composite."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for record, scores, span, kept in zip(by_prompt(records), score_array(records, "composite"), ranges,
                                          keep):
        line = {key: record[key] for key in ("prompt", "category", "task") if key in record}
        line |= {"range": round(span, 4), "mean": round(mean(scores), 4)}
        if record["source"]:
            line["source"] = [os.path.relpath(record["folder"] / path, out.parent)
                              for path in record["source"]]
        lines += [json.dumps(line)] if kept else []
    out.write_text("".join(line + "\n" for line in lines))


def histogram(values, bins=12, width=50):
    """A histogram as text."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins)
    return "\n".join(f"{low:6.3f} - {high:.3f}  "
                     f"{'#' * math.ceil(width * count / max(1, counts.max())):<{width}} {count}"
                     for count, low, high in zip(counts, edges, edges[1:]))


def within_correlation(a, b):
    """Mean Pearson correlation of two rewards within groups: (P, G), (P, G) -> float, NaN where no group has
    one.
    """
    found = []
    for x, y in zip(a, b):
        x, y = (v[np.isfinite(x) & np.isfinite(y)] for v in (x, y))
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            found.append(np.corrcoef(x, y)[0, 1])
    return mean(found)


def calibration_table(records):
    """Per category and reward: the share of constant groups, the mean range, the correlation with the other
    rewards in a group.
    """
    lines, names = [], reward_names(records)[:-1]
    scores = {name: score_array(records, name) for name in names}
    for category, rows in table_rows(records).items():
        for name in names:
            ranges, size = group_ranges(scores[name][rows]), np.nan_to_num(np.abs(scores[name][rows])).max(1)
            known = np.isfinite(ranges)
            constant = mean(ranges[known] <= 1e-4 * size[known])  # as in group_advantage
            others = (digits(within_correlation(scores[name][rows], scores[other][rows]), "+.2f")
                      for other in names)
            lines.append([category, name, digits(constant, ".1%"), digits(mean(ranges)), *others])
    return markdown(["category", "reward", "constant groups", "mean range",
                  *(f"r with {name}" for name in names)], lines)


# ---- 4. comparison (Sec. 5) --------------------------------------------------------------------------------


def check_comparable(players):
    """{name: records} must be the same prompts, categories, seed and image numbers, scored by the same
    rewards of the same weights.
    """
    def meaning(record):
        keys = ("id", "image", "prompt", "category", "seed")
        return *(record[key] for key in keys), *record.get("rewards", ()), *record.get("weights", ())

    base, *others = ({meaning(record) for record in records} for records in players.values())
    for name, other in zip(list(players)[1:], others):
        if base ^ other:
            raise UserError(f"{name}: {max(len(base - other), len(other - base))} images are of other "
                            "prompts, categories or seeds "
                             f"than {next(iter(players))}'s, or scored by other rewards; draw all from one "
                             "prompt file with the same --seed, --group-size and --reward")


def trained_on(records):
    """Rewards that the checkpoint of these records was trained on; if one is among their rewards, so is the
    composite.
    """
    names = set(records[0].get("trained_on", ()))
    return names | ({"composite"} if names & set(records[0].get("rewards", ())) else set())


def resample(count, draws, seed=0):
    """Prompts drawn with replacement, how often each: (draws, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)


def mean_difference(base, scores):
    """Paired difference of two (P, G) arrays and its 95% interval over prompts, NaN where they are too few:
    (difference, low, high)."""
    gain = np.array([mean(row) for row in scores - base if np.isfinite(row).any()])  # one per prompt
    half = half_interval(gain)
    return mean(gain), mean(gain) - half, mean(gain) + half


def compare_means(players):
    """{category: {reward: {player: {mean, difference, interval, prompts, trained_on}}}}: the form of Table 1.
    """
    base, found = next(iter(players.values())), {}
    for category, rows in table_rows(base).items():
        for reward in reward_names(base):
            arrays = {name: score_array(records, reward)[rows] for name, records in players.items()}
            first = next(iter(arrays.values()))
            for name, scores in arrays.items():
                difference, low, high = mean_difference(first, scores)
                average, difference = (float(x) if np.isfinite(x) else None
                                       for x in (mean(scores), difference))
                found.setdefault(category, {}).setdefault(reward, {})[name] = {
                    "mean": average, "difference": difference,
                    "interval": [float(low), float(high)] if np.isfinite(low) else None,
                    "prompts": np.isfinite(scores).any(1).sum().item(),
                    "trained_on": reward in trained_on(players[name])}
    return found


def count_votes(scores, tie):
    """Images on which i beats j, a tie counting half for both: scores of n players (n, P, G) -> (P, n, n)."""
    margin = tie * np.nanstd(scores)
    difference = scores[:, None] - scores[None]                                                 # (n, n, P, G)
    won = (difference > margin) + 0.5 * (np.abs(difference) <= margin)  # NaN wins nothing
    won[np.arange(len(scores)), np.arange(len(scores))] = 0
    return won.sum(-1).transpose(2, 0, 1)


def ratings(wins):
    """Bradley-Terry ratings on the Elo scale, mean 1000, from wins (n, n): maximum a posteriori under N(0,
    PRIOR^2).
    """
    games, x = wins + wins.T, np.zeros(len(wins))
    reached = np.linalg.matrix_power((games > 0) + np.eye(len(wins)), len(wins)) > 0
    if not reached.all():
        raise UserError("no chain of votes joins all checkpoints, so one scale cannot hold them")
    for _ in range(50):  # Newton's method on a concave function
        p = 1 / (1 + np.exp(x[None] - x[:, None]))                                          # (n, n) i beats j
        gradient, curvature = (wins - games * p).sum(1) - x / PRIOR**2, games * p * (1 - p)
        step = np.linalg.solve(np.diag(curvature.sum(1) + 1 / PRIOR**2) - curvature, gradient)
        x = x + step
        if np.abs(step).max() < 1e-9:
            break
    return 1000 + ELO * (x - x.mean())


def rating_intervals(votes, draws=300):
    """Ratings of votes (P, n, n) and their 95% bootstrap intervals over prompts, NaN if these are too few:
    (n,), (n,), (n,).
    """
    if len(votes) < FEW:
        return ratings(votes.sum(0)), *np.full((2, votes.shape[1]), np.nan)
    times = resample(len(votes), draws)
    low, high = np.quantile([ratings(np.tensordot(row, votes, 1)) for row in times], [0.025, 0.975], axis=0)
    return ratings(votes.sum(0)), low, high


def compare_ratings(players, reward, tie):
    """{category: {player: {rating, interval, prompts, trained_on}}}: the form of Fig. 4."""
    if reward not in reward_names(next(iter(players.values()))):
        raise UserError(f"--vote {reward}: these images were scored by "
                        f"{', '.join(reward_names(next(iter(players.values()))))}")
    votes = count_votes(np.stack([score_array(records, reward) for records in players.values()]), tie)
    found = {}
    for category, rows in table_rows(next(iter(players.values()))).items():
        voted = votes[rows][votes[rows].any((1, 2))]  # prompts that this reward has rated
        if len(voted):
            found[category] = {name: {"rating": r, "interval": [a, b] if np.isfinite(a) else None,
                                      "prompts": len(voted),
                                      "trained_on": reward in trained_on(players[name])}
                               for name, r, a, b in zip(players, *rating_intervals(voted))}
    return found


def bounds(interval, spec):
    """A 95% interval as text."""
    return f"[{', '.join(format(x, spec) for x in interval)}]" if interval else "too few prompts"


def comparison_text(players, means, elo, vote, tie):
    """Both tables as Markdown; a star marks a judge that the checkpoint was trained on."""
    base, *others = players
    lines = []
    for category, rewards in means.items():
        for reward, cells in rewards.items():
            gains = (f"{digits(cell['mean'])}{'*' * cell['trained_on']} "
                     f"({digits(cell['difference'], '+.3f')} {bounds(cell['interval'], '+.3f')})"
                     for cell in map(cells.get, others))
            lines.append([category, reward, str(cells[base]["prompts"]), digits(cells[base]["mean"]), *gains])
    rated = [[category, str(cells[base]["prompts"]), *(
        f"{cell['rating']:.0f}{'*' * cell['trained_on']} {bounds(cell['interval'], '.0f')}"
        for cell in cells.values())]
        for category, cells in elo.items()]
    return "\n".join([
        f"Means of {len(players[base])} images each; in brackets the difference from {base}, paired by "
        "prompt, and its 95% interval.", "",
        markdown(["category", "reward", "prompts", *players], lines), "",
        f"Elo from pairwise votes by {vote} (ties within {tie:g} standard deviations), with 95% intervals.",
        "",
        markdown(["category", "prompts", *players], rated), "",
        "A star marks a judge that the checkpoint was trained on."])


def compare(players, vote, tie, out):
    """Means, ratings and side-by-side pictures of checkpoints {name: records}, printed and written to `out`.
    """
    check_comparable(players)
    means, elo = compare_means(players), compare_ratings(players, vote, tie)
    text = comparison_text(players, means, elo, vote, tie)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "comparison.md", text)
    write_text(out / "comparison.json",
               json.dumps({"vote": vote, "tie": tie, "means": means, "elo": elo}, indent=2))
    shown = [[(record["prompt"], Image.open(record["folder"] / record["file"]))
              for record in by_prompt(records)[:24]]
             for records in players.values()]
    contact_sheet(out / "comparison.png", *shown, titles=tuple(players))
    print(f"{text}\n\nwrote {out}/comparison.md, .json and .png")


# ---- 5. drawing --------------------------------------------------------------------------------------------


def open_folder(args, rank):
    """rollouts/NAME: new, or that of an interrupted job with the same arguments."""
    count, folder = 1, Path("rollouts") / (args.name or "1")
    while not args.name and folder.exists():
        count, folder = count + 1, Path("rollouts") / str(count + 1)
    settings = {k: v for k, v in vars(args).items() if k in (
        "prompt", "prompts", "source", "model", "group_size", "size", "sampler_steps", "cfg", "seed",
        "rollout_batch",
        "reward", "cudnn")}
    before = read_config(folder / "args.json") if (folder / "args.json").exists() else settings
    changed = [f"--{key.replace('_', '-')}"
               for key, value in settings.items() if before.get(key, value) != value]
    if changed:
        flags = ", ".join(changed)
        raise UserError(f"{folder} was drawn with other values of {flags}; choose another --name")
    dist.barrier()  # every rank has looked before rank 0 creates it
    create_shared(folder / "images")
    if rank == 0:
        write_text(folder / "args.json", json.dumps(settings, indent=2))
        gather(folder)
    dist.barrier()
    return folder


def gather(folder):
    """What all ranks wrote, and what was there before, as one rollouts.jsonl in order; returns its records.
    """
    parts = sorted(folder.glob("rollouts.*.jsonl"))
    paths = [path for path in (folder / "rollouts.jsonl", *parts) if path.exists()]
    records = {(record["id"], record["image"]): record for path in paths for record in read_records(path)}
    records = [records[key] for key in sorted(records)]
    if parts:
        lines = [json.dumps({key: value for key, value in record.items() if key != "folder"})
                 for record in records]
        (folder / "rollouts.jsonl.part").write_text("".join(line + "\n" for line in lines))
        os.replace(folder / "rollouts.jsonl.part", folder / "rollouts.jsonl")
        for path in parts:
            path.unlink()
    return records


def new_record(request, i, g, seed, folder, rewards, scored, trained):
    """One line of rollouts.jsonl; `scored` holds (score, why) of every reward."""
    scores = {reward.name: score for reward, (score, _) in zip(rewards, scored)}
    record = {"id": i, "prompt": request.prompt, "category": request.category, "task": request.task,
              "image": g, "seed": seed,
              "file": f"images/{i:06d}-{g:02d}.png",
              "source": [os.path.relpath(path, folder) for path in request.sources]}
    if rewards:
        record |= {"rewards": {name: score if math.isfinite(score) else None
                               for name, score in scores.items()},
                   "weights": [reward.weigh(request) for reward in rewards],
                   "undefined": [name for name, score in scores.items() if score == UNDEFINED],
                   "failed": [why for _, why in scored if why],
                   "composite": composite(scores, rewards, request.category),
                   "trained_on": trained}
    return record


def draw(args):
    """Sample, score and write a group for every prompt. Rewards work on one group while the next is sampled.
    """
    rank, world, device = setup()
    root, dtype, cuda = find_model(args.model), compute_dtype(device), device.type == "cuda"
    grid, t, cfg = sampling_settings(root, args.size, args.sampler_steps, args.cfg)
    requests = load_prompts(args.prompts) if args.prompts else []
    requests += [Request(prompt, sources=tuple(args.source)) for prompt in args.prompt]
    G, batch = args.group_size, args.rollout_batch or min(8, args.group_size)
    if args.source and not args.prompt:
        raise UserError("--source goes with a PROMPT, written before the flags")
    for path in args.source:
        open_picture(path)
    rewards = load_rewards(args.reward, root)
    check_rewards(rewards, requests)
    for reward in rewards:
        if reward.range is None:
            raise UserError(f"reward {reward.name}: curation and comparison need the range of its scores: "
                            f"below the function of {reward.source} "
                            'write FUNCTION.range = (LOWEST, HIGHEST), or in a reward file "range": [LOWEST, '
                            'HIGHEST]')
    folder = open_folder(args, rank)
    before = read_records(folder) if (folder / "rollouts.jsonl").exists() else []
    for record in before:
        if record["id"] >= len(requests) or requests[record["id"]].prompt != record["prompt"]:
            raise UserError(f"{folder}: prompt {record['id']} was {record['prompt']!r} when it was drawn; "
                            "choose another --name")
    # failed scores are tried again
    done = {(record["id"], record["image"]) for record in before if not record.get("failed")}
    todo = [i for i in range(len(requests)) if any((i, g) not in done for g in range(G))]
    if rank == 0:
        print(f"{folder}: {len(requests)} prompts x {G} images of {in_pixels(grid)}, "
              f"{len(t) - 1} steps, guidance {cfg:g} ({guidance_source(root, args.cfg)})"
              + f"; {len(requests) - len(todo)} prompts are there already" * (len(todo) < len(requests)))
    mine = todo[rank::world]
    vae = load_vae(root, device, dtype)
    encoded = encode_prompts(root, vae, {i: requests[i] for i in mine}, grid, device)
    network = materialise(new_transformer(root, dtype), root, device).requires_grad_(False)
    longest, config = longest_prefix(encoded, 1 + (cfg != 1)) if mine else 0, network.config
    sampler = Sampler(network, cuda if args.graph is None else args.graph, longest, args.cudnn)
    load_vlms(rewards, device)
    seat_judges(rewards, device)
    pools = reward_threads(rewards, device)
    trained = read_config(root / "model_index.json").get("_sampling", {}).get("trained_on", [])

    def write(file, i, images, futures):
        scored = [future.result() for future in futures]
        for g, image in enumerate(images):
            record = new_record(requests[i], i, g, args.seed, folder, rewards, [row[g] for row in scored],
                                trained)
            image.save(folder / record["file"])
            file.write(json.dumps(record) + "\n")
        file.flush()

    waiting, sampling, work, began = None, 0.0, 0, time.perf_counter()
    with open(folder / f"rollouts.{rank}.jsonl", "a") as file:
        for i in tqdm(mine, disable=rank > 0, dynamic_ncols=True):
            images, clock = [], time.perf_counter()
            # filled up with copies, so that shapes and so the bits do not depend on G
            for first in range(0, G, batch):
                keys = [(0, i, min(g, G - 1)) for g in range(first, first + batch)]
                (_, pictures, _), = generate(sampler, vae, encoded, keys, grid, t, torch.zeros(len(t) - 1),
                                             cfg, args.seed, batch)
                images += pictures[:G - first]
            sampling += time.perf_counter() - clock
            flops = [forward_flops(config, grid[0] * grid[1], prompt)
                     for prompt in encoded[i][:2 if cfg != 1 else 1]]
            work += math.ceil(G / batch) * batch * (len(t) - 1) * sum(flops)
            futures = [pool.submit(reward, images, [requests[i]] * G) for pool, reward in zip(pools, rewards)]
            if waiting:
                write(file, *waiting)
            waiting = i, images, futures
        if waiting:
            write(file, *waiting)
    if rank == 0 and mine:
        total = time.perf_counter() - began
        print(f"rank 0: {len(mine) * G / total:.2f} images a second, {sampling / total:.0%} of the time "
              f"sampled and decoded, the rest waited for and written; MFU "
              f"{work / total / matmul_peak(device):.1%}")
    dist.barrier()
    if rank == 0:
        show(folder, gather(folder))
    dist.barrier()


def show(folder, records):
    """Print the scores, what failed, and where everything is; save a grid of the first prompts, a row each.
    """
    if "rewards" in records[0]:
        print(score_table(records))
        reasons = [why for record in records for why in record["failed"]]
        if reasons:
            print(f"{len(reasons)} scores failed, the first: {reasons[0]}")
    rows = {record["id"]: [] for record in records}
    for record in records:
        score = record.get("composite")
        label = record["prompt"] if score is None else f"{score:.2f} {record['prompt']}"
        rows[record["id"]].append((label, folder / record["file"]))
    first = [[(label, Image.open(path)) for label, path in row[:8]] for row in list(rows.values())[:12]]
    contact_sheet(folder / "grid.png", *first)
    print(f"{len(records)} images in {folder / 'images'}, the first in {folder / 'grid.png'}")


def main(argv=None):
    """Draw, compare, curate or calibrate, as the flags say."""
    args = parse_args(argv)
    if args.prompt or args.prompts:
        draw(args)
    elif not (args.curate or args.calibrate or args.compare):
        raise UserError("nothing to do: give a PROMPT (before the flags), --prompts FILE, --curate, "
                        "--calibrate or --compare")
    if args.curate:
        records, out = read_all(args.curate), Path(args.out or "curated.jsonl")
        ranges, keep = curate(records, args.min_range, args.quantile)
        write_curated(records, ranges, keep, out)
        print(f"intra-group range of the composite reward\n{histogram(ranges)}")
        counts = [[name, str(keep[rows].sum()), str(len(rows))] for name, rows in table_rows(records).items()]
        print(f"{markdown(['category', 'kept', 'of'], counts)}\nwrote {keep.sum()} prompts to {out}")
    if args.calibrate:
        print(calibration_table(read_all(args.calibrate)))
    if args.compare:
        names = [spec.partition("=")[0] for spec in args.compare]
        if not all("=" in spec for spec in args.compare) or len(set(names)) < len(names):
            raise UserError(f"--compare {' '.join(args.compare)}: want NAME=DIR with different names")
        players = {name: read_records(spec.partition("=")[2]) for name, spec in zip(names, args.compare)}
        compare(players, args.vote, args.tie, Path(args.out or "compared"))


if __name__ == "__main__":
    command_line(main)
