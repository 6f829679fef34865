"""Pointwise reward model (Sec. 3.1): a VLM learns to rate pictures from 1 to 5 on a rubric.

The answer is a single token 1..5; the score is the expectation under the VLM's distribution over the five (Eq. 12),
regressed to the human score (Eq. 11). The result is an ordinary Hugging Face directory with reward.json (the rubric)
beside the weights, ready for `grpo.py --reward NAME=DIRECTORY`.

    python train_reward.py --reward aesthetic --data scores.jsonl --out rewards/aesthetic

Data: JSON Lines of {"prompt", "image", "score" (1-5, fractions allowed), "source"?: path or [paths]}, paths relative to the
file. Lines with the same prompt form a group, for the rank correlation within groups.

Differs from the paper:
  1. The distribution is renormalised over the five tokens, and a term keeps the probability mass on them; where the mass
     is 1 this is Eq. 12 as printed.
  2. Eq. 11 is averaged over the batch, not summed.
  3. No chain of thought and no pairwise objective (Eq. 10) yet.
"""

import argparse
import json
from pathlib import Path

from model import (
    RUBRICS, Processor, expected_score, find_rubric, on_white, score_text, score_tokens, write_text)
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tests" / "tiny" / "model"

# ---- 1. arguments --------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward", required=True, metavar="NAME",
        help=f"which built-in rubric to ask: {', '.join(RUBRICS)}; or any name, with --rubric")
    add("--rubric", metavar="FILE", help="text file with the rubric, {prompt} where the prompt goes")
    add("--data", required=True, metavar="FILE", help="scored pictures to train on")
    add("--eval-data", metavar="FILE", nargs="*", default=[], help="held-out scored pictures")
    add("--out", required=True, metavar="DIR", help="directory to write")
    add("--base", default=str(TINY / "text_encoder"), metavar="DIR", help="VLM to start from (default: the tiny one)")
    add("--processor", metavar="DIR", help="its tokenizer and image processor (default: --base, or ../processor)")
    add("--pixels", type=int, metavar="N", help="enlarge smaller pictures to N pixels (default: as the processor does)")
    add("--steps", type=int, default=400, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=32, help="pictures per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3,
        help="AdamW, linear decay to 0 (default: %(default)s, for the tiny VLM; 2e-6 for a 7B one)")
    add("--mass-coef", type=float, default=0.1, help="weight of -log(mass on the score tokens) (default: %(default)s)")
    add("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    return parser.parse_args(argv)


# ---- 2. data -------------------------------------------------------------------------------------------------


def load_scores(path):
    """Scored pictures: [(prompt, [source and output paths], score)]. A bad line is an error that names it."""
    path, rows = Path(path), []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            sources = record.get("source", [])
            names = [*([sources] if isinstance(sources, str) else sources), record["image"]]
            prompt, score = record["prompt"], float(record["score"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'{path}:{number}: want {{"prompt", "image", "score"}} ({error!r})') from None
        if not 1 <= score <= 5:
            raise ValueError(f"{path}:{number}: score {score} is not between 1 and 5")
        for name in names:
            if not (path.parent / name).is_file():
                raise FileNotFoundError(f"{path}:{number}: no picture {path.parent / name}")
        rows.append((prompt, [path.parent / name for name in names], score))
    if not rows:
        raise ValueError(f"{path} holds no scored pictures")
    return rows


def collate(processor, rubric, rows, device):
    """Model inputs up to the score token, and the human scores (B,)."""
    texts = [score_text(processor.tokenizer, rubric, prompt, len(paths)) for prompt, paths, _ in rows]
    inputs = processor(texts, [on_white(Image.open(path)) for _, paths, _ in rows for path in paths])
    return {k: v.to(device) for k, v in inputs.items()}, torch.tensor([score for _, _, score in rows], device=device)


# ---- 3. loss -------------------------------------------------------------------------------------------------


def pointwise_loss(logits, tokens, y, mass_coef):
    """logits (B, V) at the score position, y (B,) human scores -> loss (), predicted scores (B,)."""
    score, mass = expected_score(logits, tokens)                                                             # (B,)  Eq. 12, difference 1
    return ((score - y) ** 2).mean() - mass_coef * mass.log().mean(), score                                  # ()    Eq. 11, difference 2


# ---- 4. evaluation -------------------------------------------------------------------------------------------


def ranks(values):
    """Ranks of a 1D array, ties averaged."""
    values = np.asarray(values, dtype=np.float64)
    return (np.sort(values).searchsorted(values, "left") + np.sort(values).searchsorted(values, "right") - 1) / 2


def correlation(a, b):
    """Pearson correlation; NaN where one side is constant."""
    a, b = np.asarray(a) - np.mean(a), np.asarray(b) - np.mean(b)
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


@torch.no_grad()
def evaluate(vlm, processor, tokens, rubric, rows, device, batch=32):
    """SRCC, PLCC, mean absolute error, mass on the score tokens, and the mean rank correlation within prompts."""
    scores, masses = [], []
    for first in range(0, len(rows), batch):
        inputs, _ = collate(processor, rubric, rows[first:first + batch], device)
        score, mass = expected_score(vlm(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1], tokens)
        scores, masses = scores + score.tolist(), masses + mass.tolist()
    scores, truth, groups = np.array(scores), np.array([row[2] for row in rows]), {}
    for i, row in enumerate(rows):
        groups.setdefault(row[0], []).append(i)
    within = [correlation(ranks(scores[g]), ranks(truth[g])) for g in groups.values() if len(g) > 2]
    return {
        "n": len(rows), "srcc": correlation(ranks(scores), ranks(truth)), "plcc": correlation(scores, truth),
        "mae": float(np.abs(scores - truth).mean()), "mass": float(np.mean(masses)),
        "group_srcc": float(np.nanmean(within)) if within else None, "groups": len(within)}


def main():
    # ---- 5. setup --------------------------------------------------------------------------------------------
    args = parse_args()
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rubric = Path(args.rubric).read_text().strip() if args.rubric else find_rubric(args.reward)
    beside = Path(args.base).parent / "processor"
    processor = Processor(args.processor or (beside if beside.is_dir() else args.base))
    if args.pixels:
        processor.image_processor.size = {"shortest_edge": args.pixels, "longest_edge": max(args.pixels, 16777216)}
    tokens = score_tokens(processor.tokenizer)

    # ---- 6. data ---------------------------------------------------------------------------------------------
    train, held_out = load_scores(args.data), {path: load_scores(path) for path in args.eval_data}

    # ---- 7. model --------------------------------------------------------------------------------------------
    vlm = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    size = sum(param.numel() for param in vlm.parameters())
    print(f"{args.reward}: {size:,} parameters, {len(train)} scored pictures, {args.steps} steps of {args.batch}")

    # ---- 8. train --------------------------------------------------------------------------------------------
    order, bar, running = [], tqdm(range(args.steps), desc=args.reward, dynamic_ncols=True), None
    for step in bar:
        if len(order) < args.batch:
            order += torch.randperm(len(train)).tolist()
        batch, order = [train[i] for i in order[:args.batch]], order[args.batch:]
        inputs, y = collate(processor, rubric, batch, device)
        logits = vlm(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]                              # (B, V)
        loss, score = pointwise_loss(logits, tokens, y, args.mass_coef)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps) * min(1, (step + 1) / 20)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")

    # ---- 9. done ---------------------------------------------------------------------------------------------
    out = Path(args.out)
    vlm.eval().to(torch.bfloat16).save_pretrained(out)
    processor.tokenizer.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    vlm.to(torch.float32)
    result = {path: evaluate(vlm, processor, tokens, rubric, rows, device) for path, rows in held_out.items()}
    card = {"name": args.reward, "rubric": rubric, "held_out": {Path(path).name: row for path, row in result.items()}}
    write_text(out / "reward.json", json.dumps(card, indent=2))
    for path, row in result.items():
        cells = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(f"{Path(path).name}: {'  '.join(cells)}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
