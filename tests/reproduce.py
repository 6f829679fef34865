"""Make the README's numbers and pictures; every part prints its table and writes its pictures, if it has any,
into assets/.

    python tests/reproduce.py first        # the first command: its time, three seeds of it, picture and curve
    python tests/reproduce.py strict       # a reward that is exact, by both algorithms
    python tests/reproduce.py chain        # the README's chain, its time and what its student keeps
    python tests/reproduce.py guidance     # in rollout and objective, in one or neither (Sec. 4.1, Fig. 3)
    python tests/reproduce.py timesteps    # trained on all of them or the noisy ones (Sec. 4.2)
    python tests/reproduce.py curation     # a pool of which half is nearly always right or wrong (Sec. 4.2)
    python tests/reproduce.py distillation # specialists and their student against Mix-RL (Sec. 4.3)
    python tests/reproduce.py paradigms    # a reward model of scores against one of preferences (Sec. 3.1)
    python tests/reproduce.py weights      # rewards normalised or not, weights by category or not (Eq. 13)
    python tests/reproduce.py reasoning    # an alignment scorer that says what it sees (Sec. 3)
    python tests/reproduce.py objective    # what Eq. 6 leaves open
    python tests/reproduce.py forks        # the algorithms in tests/forks, at equal time

Trainings run side by side, one for every core. What is done already, in this or an earlier call, is not done
again; directories are named after the base, so that another base begins anew.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]

import make
import model
import rollout
import world

ASSETS, TINY, BUILD = ROOT / "assets", ROOT / "tests" / "tiny", ROOT / "tests" / "tiny" / "build"
ORACLES = ["oracle-aesthetic", "oracle-strict", "oracle-alignment", "oracle-palette"]
JUDGES = ["aesthetic", *ORACLES]
GUIDANCE = model.sampling_settings(TINY / "model")[2]
SEEDS = 3
STRICT = f"strict={TINY / 'world.py'}:strict_reward"
# chosen on seed 3
STRICT_FLAGS = {"GRPO": ("--lr", "2.56e-4", "--kl-coef", "0.1"), "NFT": ("--lr", "2.56e-4")}
# rewards, prompts, steps; held-out prompts, images of each
TASKS = {"t2i": ("rewards.json", "prompts.jsonl", 20, "heldout.jsonl", 4),
         "edit": ("rewards_edit.json", "edits.jsonl", 40, "edits_heldout.jsonl", 4)}


def start(*arguments, processes=1):
    """A script of this repository as a process, or as several by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), *arguments], cwd=ROOT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process):
    if process.wait():
        raise SystemExit(f"{' '.join(process.args)} failed")


# A training is judged by drawing held-out prompts after some of its steps.


@functools.cache
def base():
    """Six letters that name what everything starts from: weights, rewards, prompts and oracle."""
    files = [TINY / "world.py", *TINY.glob("*.json*"), *(TINY / "model").rglob("*.safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:6]


class Drawing(NamedTuple):
    """Held-out prompts of a task, so many images of each, at a guidance scale (None: the base's), judged by
    the task's rewards or by the aesthetic scorer and the oracle
    """

    task: str = "t2i"
    images: int = 2
    cfg: float | None = None
    rewards: bool = False


class Run(NamedTuple):
    """A training, drawn after each of `stages` steps. `what` names it in tables."""

    script: str
    what: str
    seed: int
    flags: tuple = ()
    stages: tuple = (30,)
    drawings: tuple = (Drawing(),)
    processes: int = 1

    @property
    def folder(self):
        return ROOT / "runs" / "-".join([base(), Path(self.script).stem, *self.what.split(), str(self.seed)])

    def drawn(self, steps, drawing):
        """Where the pictures after so many steps are"""
        more = ([] if drawing.cfg is None else [f"cfg{drawing.cfg:g}"]) + ["rewards"] * drawing.rewards
        return ROOT / "rollouts" / "-".join([self.folder.name, str(steps), drawing.task, str(drawing.images),
                                             *more])

    def scores(self, judge, steps=None, drawing=None):
        """(P, G) of a judge after so many steps, by default all, in a drawing, by default the first"""
        records = rollout.read_records(self.drawn(self.stages[-1] if steps is None else steps,
                                                  drawing or self.drawings[0]))
        return rollout.score_array(records, judge)


def untrained(*drawings):
    return Run("base", "", 0, (), (0,), drawings or (Drawing(),))


def carry_out(run):
    """Train and draw whatever is missing."""
    sources = ["aesthetic", *(f"{name}={TINY / 'world.py'}:{name.removeprefix('oracle-')}_reward"
                              for name in ORACLES)]
    for steps in run.stages:
        missing = [drawing for drawing in run.drawings if not is_complete(run.drawn(steps, drawing), drawing)]
        if missing and steps:
            train_up_to(run, steps)
        for drawing in missing:
            rewards, heldout = TASKS[drawing.task][0], TASKS[drawing.task][3]
            finish(start("rollout.py", "--name", run.drawn(steps, drawing).name, "--model",
                         str(run.folder / "model" if steps else TINY / "model"), "--prompts",
                         str(TINY / heldout), "--group-size", str(drawing.images), "--reward",
                         *([str(TINY / rewards)] if drawing.rewards else sources),
                         "--cfg", str(GUIDANCE if drawing.cfg is None else drawing.cfg)))


def is_complete(folder, drawing):
    """Whether every picture is drawn and scored."""
    wanted = len((TINY / TASKS[drawing.task][3]).read_text().splitlines()) * drawing.images
    return (folder / "rollouts.jsonl").exists() and len(rollout.read_records(folder)) == wanted


def train_up_to(run, steps, table=0):
    """Leave the model after exactly so many steps; one that went further begins anew. table: images of the
    script's own final table
    """
    log, weights = run.folder / "log.jsonl", run.folder / "model" / "model_index.json"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    if done == steps and weights.exists() and weights.stat().st_mtime >= log.stat().st_mtime:
        return
    if done > steps:
        shutil.rmtree(run.folder)
    finish(start(run.script, *run.flags, "--seed", str(run.seed), "--name", run.folder.name, "--steps",
                 str(steps), "--eval-images", str(table), "--sample-every", "0",
                 *(["--resume"] if run.folder.exists() else []), processes=run.processes))


def step_seconds(run):
    """How long each step of a training took."""
    return [sum(json.loads(line)["seconds"].values()) for line in (run.folder / "log.jsonl").open()]


def queue(*jobs):
    """Carry out runs, or lists of runs that need each other, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: [carry_out(run) for run in ([job] if isinstance(job, Run) else job)], jobs))


def gain(run, judge, steps=None, drawing=None):
    """Difference to the base and its 95% interval, paired by prompt."""
    drawing = drawing or run.drawings[0]
    return rollout.mean_difference(untrained(drawing).scores(judge), run.scores(judge, steps, drawing))


def with_interval(difference):
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)


def stage_table(groups, judges, drawing=None):
    """Gains over the base after each stage, by default in the first drawing; groups {title: the runs of all
    seeds}.
    """
    stages = next(iter(groups.values()))[0].stages
    lines = [f"| | base | {' | '.join(f'after {steps} steps' for steps in stages)} | interval |",
             "|---" * (3 + len(stages)) + "|"]
    for title, runs in groups.items():
        for judge in judges:
            gains = [[gain(run, judge, steps, drawing) for run in runs] for steps in stages]
            cells = [" / ".join(f"{mean:+.3f}" for mean, _, _ in row) for row in gains]
            half = sum(high - mean for mean, _, high in gains[-1]) / len(runs)
            mean = rollout.mean(untrained(drawing or runs[0].drawings[0]).scores(judge))
            lines.append(f"| {title}: {judge} | {mean:.3f} | {' | '.join(cells)} | ± {half:.3f} |")
    return lines


def finished(runs, judges, drawing=None):
    """[{judge: (P, G)}] of the finished models of all seeds."""
    return [{judge: run.scores(judge, None, drawing) for judge in judges} for run in runs]


def compare(base, groups, rows=slice(None)):
    """Gains over the base and over the first group: of every seed, and of all together with an interval over
    prompts, all of them or some. groups {title: [{judge: (P, G)}] of all seeds}; base as one seed.
    """
    judges = list(base)
    lines = [f"| | {' | '.join(judges)} |", "|---" * (1 + len(judges)) + "|"]
    (name, first), *others = groups.items()
    pairs = {title: ([base] * len(seeds), seeds) for title, seeds in groups.items()}
    pairs |= {f"{title}, over {name}": (first, seeds) for title, seeds in others}
    for title, (before, after) in pairs.items():
        cells = []
        for judge in judges:
            arrays = [[seed[judge][rows] for seed in seeds] for seeds in (before, after)]
            each = " / ".join(f"{rollout.mean_difference(*pair)[0]:+.3f}" for pair in zip(*arrays))
            together = rollout.mean_difference(*(np.concatenate(of, axis=1) for of in arrays))
            cells.append(f"{each}; {with_interval(together)}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def compare_runs(groups, judges, drawing=None, rows=slice(None)):
    """`compare` for {title: the runs of all seeds}."""
    drawing = drawing or next(iter(groups.values()))[0].drawings[0]
    [base] = finished([untrained(drawing)], judges, drawing)
    return compare(base, {title: finished(runs, judges, drawing) for title, runs in groups.items()}, rows)


def stage_chart(path, lines, title):
    """Mean and range over seeds of a held-out score; lines {name: (the runs of all seeds, judge)}."""
    curves, bands = {}, {}
    for name, (runs, judge) in lines.items():
        scores = {0: [rollout.mean(untrained(run.drawings[0]).scores(judge)) for run in runs]}
        for steps in runs[0].stages:
            scores[steps] = [rollout.mean(run.scores(judge, steps)) for run in runs]
        curves[name] = [(steps, sum(values) / len(values)) for steps, values in scores.items()]
        bands[name] = [(steps, min(values), max(values)) for steps, values in scores.items()]
    model.line_chart(path, curves, title, "step", bands=bands)


def timed(*arguments, processes=2):
    """Seconds of a command, without what an earlier call of it has left."""
    shutil.rmtree(ROOT / "runs" / "reproduce-timed", ignore_errors=True)
    began = time.time()
    finish(start(*arguments, "--name", "reproduce-timed", processes=processes))
    return time.time() - began


def first():
    """The README's first command: how long it takes, alone; its gains in three seeds on the way, the share of
    right pictures of many; the README's picture.
    """
    lines = [f"the first command took {timed('grpo.py', '--reward', 'aesthetic'):.0f} s", ""]
    many = Drawing(images=8)
    runs = {script: [Run(f"{script.lower()}.py", "aesthetic", seed, ("--reward", "aesthetic"), (10, 20, 30),
                         (Drawing(),)) for seed in range(SEEDS)] for script in ("GRPO", "NFT")}
    last = [run._replace(stages=(30,), drawings=(many,)) for run in runs["GRPO"]]
    queue(untrained(), untrained(many), *runs["NFT"], *map(list, zip(runs["GRPO"], last)))
    lines += stage_table(runs, JUDGES)
    seeds = " | ".join(f"seed {seed}" for seed in range(SEEDS))
    lines += ["", f"| GRPO, {many.images} pictures a prompt | {seeds} |",
              "|---" * (1 + SEEDS) + "|"]
    lines += [f"| {judge} | {' | '.join(with_interval(gain(run, judge)) for run in last)} |"
              for judge in ORACLES]
    stage_chart(ASSETS / "first_curve.png", {"the scorer that is trained on": (runs["GRPO"], "aesthetic"),
                                             "the oracle": (runs["GRPO"], "oracle-aesthetic")},
                f"aesthetic of held-out pictures, mean and range of {SEEDS} seeds")
    before, *after = (rollout.by_prompt(rollout.read_records(run.drawn(run.stages[-1], many)))
                      for run in (untrained(many), *last))
    before_after(ASSETS / "first.png", before, after[0])
    for seed in range(SEEDS):
        blind_pairs(ROOT / "runs" / f"blind-{seed}.png", before, after[seed], seed)
    return lines


def before_after(path, before, after, count=8, side=128):
    """The first held-out prompts, the first picture of each by both: a green frame where the oracle sees what
    was asked, else a red one, and its aesthetic score below.
    """
    rows, margin, font = {"base": before, "trained": after}, 76, ImageFont.load_default(14)
    sheet = Image.new("RGB", (margin + count * (side + 12), 2 * (side + 34) + 44), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (title, records) in enumerate(rows.items()):
        top = 6 + y * (side + 34)
        pen.text((6, top + side / 2), title, fill="black", font=font, anchor="lm")
        for x, record in enumerate(records[:count]):
            left, right = margin + x * (side + 12), record["rewards"]["oracle-strict"]
            frame = "#2a9d3a" if right else "#d62728"
            pen.rectangle((left - 4, top - 4, left + side + 3, top + side + 3), fill=frame)
            image = model.on_white(Image.open(record["folder"] / record["file"]))
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, top))
            pen.text((left + side / 2, top + side + 6), f"{record['rewards']['oracle-aesthetic']:.2f}",
                     fill="black", font=font, anchor="mt")
            if y:
                pen.text((left, top + side + 26), model.fold(record["prompt"], side - 16), fill="black",
                         font=ImageFont.load_default(11), spacing=1)
    sheet.save(path)


def blind_pairs(path, before, after, seed, count=24):
    """Pairs of the two for a reader who is not to know which is which: left or right by chance; the key lies
    beside the picture.
    """
    rng = random.Random(f"blind {seed}")
    key = [rng.choice(("left", "right")) for _ in range(count)]  # where the trained model's is
    cells = []
    for i, side in enumerate(key):
        pair = (before[i], after[i]) if side == "right" else (after[i], before[i])
        cells += [(f"{i + 1} {side}", Image.open(record["folder"] / record["file"]))
                  for side, record in zip(("left", "right"), pair)]
    model.contact_sheet(path, cells)
    path.with_suffix(".json").write_text(json.dumps(key))


def strict():
    """Trained on what the oracle sees itself: 1 where the picture shows exactly what was asked, else 0. Three
    seeds of each, and how far one goes in an hour.
    """
    stages = {"GRPO": (50, 100, 150, 200, 300), "NFT": (50, 100, 150, 200)}
    runs = {title: [Run(f"{title.lower()}.py", "strict", seed, ("--reward", STRICT, *flags), stages[title])
                    for seed in range(SEEDS)] for title, flags in STRICT_FLAGS.items()}
    hour = runs["NFT"][0]._replace(stages=(200, 400, 500))
    queue(untrained(), [runs["NFT"][0], hour], *runs["GRPO"], *runs["NFT"][1:])
    stage_chart(ASSETS / "strict_curve.png",
                {title: (seeds, "oracle-strict") for title, seeds in runs.items()},
                f"held-out pictures that show what was asked, mean and range of {SEEDS} seeds")
    lines = []
    for title, seeds in {**runs, "NFT, an hour": [hour]}.items():
        seconds = step_seconds(seeds[-1])
        lines += [*stage_table({title: seeds}, JUDGES), "",
                  f"{len(seconds)} steps take {sum(seconds) / 60:.0f} minutes of a core", ""]
    return lines


def both_tasks(cfg=None):
    """A drawing of each task, scored by its rewards."""
    return tuple(Drawing(task, images, cfg, rewards=True) for task, (*_, images) in TASKS.items())


def teach(script, seed):
    """{task: the training of its teacher}."""
    return {task: Run(script, task, seed, ("--reward", str(TINY / rewards), "--prompts", str(TINY / prompts),
                                           "--eval-prompts", str(TINY / heldout)), (steps,), (drawing,))
            for (task, (rewards, prompts, steps, heldout, _)), drawing in zip(TASKS.items(), both_tasks())}


def distil(name, seed, teachers):
    """The student of {task: teacher}, drawn without guidance."""
    given = (f"{task}={teacher.folder / 'model'}" for task, teacher in teachers.items())
    return Run("opd.py", name, seed, ("--teacher", *given), (90,), both_tasks(cfg=1.0))


def chain():
    """The README's chain, two teachers and their student, in three seeds, and which share of its teachers'
    gains the student has without guidance.
    """
    teachers = [teach("nft.py", seed) for seed in range(SEEDS)]
    students = [distil("student", seed, teachers[seed]) for seed in range(SEEDS)]
    began, fresh = time.time(), not any(run.folder.exists() for run in (*teachers[0].values(), students[0]))
    for run in (*teachers[0].values(), students[0]):
        train_up_to(run._replace(processes=2), run.stages[-1], table=300)
    took = f"seed 0 alone, with the teachers' final tables: {(time.time() - began) / 60:.1f} minutes"
    base = untrained(*both_tasks(), *both_tasks(cfg=1.0))
    queue(base, *([*of.values(), student] for of, student in zip(teachers, students)))
    drawn = {task: {"base": [base.drawn(0, guided)], "base, unguided": [base.drawn(0, unguided)],
                    "teacher": [last_drawn(of[task], guided) for of in teachers],
                    "student, unguided": [last_drawn(student, unguided) for student in students]}
             for task, guided, unguided in zip(TASKS, both_tasks(), both_tasks(cfg=1.0))}
    chain_sheet(ASSETS / "chain.png", {title: folders[0] for title, folders in drawn["edit"].items()
                                       if title != "base, unguided"})
    return [took, ""] * fresh + share_table(drawn) + reward_tables(drawn)


def last_drawn(run, drawing):
    """Where the pictures of the finished model are"""
    return run.drawn(run.stages[-1], drawing)


def share_table(drawn):
    """Gains in the composite of teachers and students; drawn {task: {who: the folders of all seeds}}."""
    lines = ["| task | seed | teacher's gain [95% interval] | student's | share of it [bootstrap] |",
             "|---|---|---|---|---|"]
    for task, folders in drawn.items():
        scores = {who: [rollout.score_array(rollout.read_records(folder), "composite") for folder in of]
                  for who, of in folders.items()}
        seeds = [[*scores["base"], *pair] for pair in zip(scores["teacher"], scores["student, unguided"])]
        together = [np.concatenate(of, axis=1) for of in zip(*seeds)]
        for name, arrays in (*enumerate(seeds), ("all", together)):
            gains = (with_interval(rollout.mean_difference(arrays[0], of)) for of in arrays[1:])
            lines.append(f"| {task} | {name} | {' | '.join(gains)} | {share_of_gain(*arrays)} |")
    return lines


def reward_tables(drawn):
    """Means of every reward of a task, and of what the oracle says."""
    lines = []
    for task, folders in drawn.items():
        tables = {who: [judged(folder) for folder in of] for who, of in folders.items()}
        lines += ["", f"| {task} | {' | '.join(tables)} |", "|---" * (1 + len(tables)) + "|"]
        for judge in sorted(tables["base"][0]):
            cells = [" / ".join(f"{rollout.mean(scores[judge]):.3f}" for scores in of)
                     for of in tables.values()]
            lines.append(f"| {judge} | {' | '.join(cells)} |")
    return lines


def judged(folder):
    """{reward: (P, G)} of a task's drawing, with the oracle's word on every picture that a reward judges, and
    whether it shows exactly what was asked.
    """
    records = rollout.read_records(folder)
    for record in records:
        image, *sources = [Image.open(record["folder"] / path)
                           for path in (record["file"], *record.get("source", []))]
        for name in ("strict", *(name for name, score in record["rewards"].items() if score is not None)):
            oracle = getattr(world, f"{name}_reward", None)
            if oracle:
                record["rewards"][f"oracle-{name}"] = oracle([image], [record["prompt"]], [sources])[0]
    names = {name for record in records for name in record["rewards"]}
    return {name: rollout.score_array(records, name) for name in (*names, "composite")}


def chain_sheet(path, folders):
    """The first held-out edit of each kind: its source, and the first picture by every model."""
    records = {title: rollout.by_prompt(rollout.read_records(folder)) for title, folder in folders.items()}
    kinds = [world.edit_kind(record["prompt"]) for record in records["base"]]
    shown = [kinds.index(kind) for kind in world.EDIT_KINDS]
    picked = {title: [of[i] for i in shown] for title, of in records.items()}
    sources = [(r["prompt"], Image.open(r["folder"] / r["source"][0])) for r in picked["base"]]
    outputs = [[("", Image.open(r["folder"] / r["file"])) for r in of] for of in picked.values()]
    model.contact_sheet(path, sources, *outputs, titles=("source", *picked))


def share_of_gain(before, teacher, student, draws=10_000):
    """The student's gain over the teacher's, with a 95% bootstrap interval over prompts; arrays (P, G)."""
    gains = np.stack([np.nanmean(scores - before, axis=1) for scores in (teacher, student)])          # (2, P)
    prompts = gains.shape[1]
    picked = gains[:, np.random.default_rng(0).integers(prompts, size=(draws, prompts))].mean(-1)
    low, high = np.quantile(picked[1] / picked[0], (0.025, 0.975))
    return f"{gains[1].mean() / gains[0].mean():.0%} [{low:.0%}, {high:.0%}]"


def distillation():
    """Sec. 4.3: specialists and their student are said to beat Mix-RL, one training on both tasks; here by
    NFT on as many pictures and updates of each task as the specialists have together. And what else a student
    may be of: GRPO's specialists, Mix-RL's model; and its own guidance again.
    """
    mixed = BUILD / "mixed.jsonl"  # each task's share of it is like its share of the specialists' steps
    mixed.parent.mkdir(parents=True, exist_ok=True)
    t2i, edits = ((TINY / prompts).read_text() for _, prompts, *_ in TASKS.values())
    mixed.write_text(t2i + 3 * edits.replace('"sources/', f'"{TINY}/sources/'))
    flags = ("--reward", str(TINY / "rewards_mixed.json"), "--prompts", str(mixed))
    steps, guided, unguided = sum(task[2] for task in TASKS.values()), both_tasks(), both_tasks(cfg=1.0)
    drawn, jobs = {task: {} for task in TASKS}, []
    for seed in range(SEEDS):
        specialists, others = teach("nft.py", seed), teach("grpo.py", seed)
        mix = Run("nft.py", "mix", seed, flags, (steps,), guided)
        students = {"student": distil("student", seed, specialists)._replace(drawings=unguided + guided),
                    "student of GRPO": distil("student grpo", seed, others),
                    "student of Mix-RL": distil("student mix", seed, dict.fromkeys(TASKS, mix))}
        jobs += [[*of, student] for of, student in zip((specialists.values(), others.values(), [mix]),
                                                       students.values())]
        for place, task in enumerate(TASKS):
            who = {"teacher": last_drawn(specialists[task], guided[place]),
                   "Mix-RL": last_drawn(mix, guided[place])}
            who |= {f"{name}, unguided": last_drawn(run, unguided[place]) for name, run in students.items()}
            who |= {"student, guided": last_drawn(students["student"], guided[place]),
                    "teacher by GRPO": last_drawn(others[task], guided[place])}
            for name, folder in who.items():
                drawn[task].setdefault(name, []).append(folder)
    base = untrained(*guided, *unguided)
    queue(base, *jobs)
    lines = []
    for place, task in enumerate(TASKS):
        drawn[task] = {"base": [base.drawn(0, guided[place])] * SEEDS} | drawn[task]
        drawn[task]["base, unguided"] = [base.drawn(0, unguided[place])] * SEEDS
        lines += ["", *gain_table(task, drawn[task])]
    return lines


def gain_table(task, drawn):
    """Gains of all seeds together in the composite and in the oracle's strict; drawn {who: folders of all
    seeds}, the base and the teacher first.
    """
    found = {who: [judged(folder) for folder in folders] for who, folders in drawn.items()}
    scores = {who: {judge: np.concatenate([of[judge] for of in seeds], axis=1)
                    for judge in ("composite", "oracle-strict")} for who, seeds in found.items()}
    base, teacher = scores["base"], scores["teacher"]["composite"]
    lines = [f"| {task} | composite | of the NFT teacher's gain | over Mix-RL, guided | strict |",
             "|---" * 5 + "|"]
    for who, of in scores.items():
        gained, strict = (with_interval(rollout.mean_difference(base[judge], of[judge])) for judge in of)
        over = with_interval(rollout.mean_difference(scores["Mix-RL"]["composite"], of["composite"]))
        share = share_of_gain(base["composite"], teacher, of["composite"])
        lines.append(f"| {who} | {gained} | {share} | {over} | {strict} |")
    return lines


def guidance():
    """Sec. 4.1: guidance in rollout and objective is said to collapse, in neither to lose knowledge, in the
    rollout alone to do neither. What would collapse is the branch without a prompt: how far it moves.
    """
    strategies = {"hybrid": (), "guided in both": ("--guided-objective",),
                  "guided in neither": ("--cfg", "1")}
    flags = ("--reward", "aesthetic", "--kl-coef", "0", "--lr", "2.56e-4")
    drawings = Drawing(), Drawing(cfg=1.0)
    runs = {title: [Run("grpo.py", title, seed, (*flags, *more), (40, 80, 120), drawings)
                    for seed in range(SEEDS)] for title, more in strategies.items()}
    queue(untrained(*drawings), *(run for seeds in runs.values() for run in seeds))
    stage_chart(ASSETS / "guidance_curve.png",
                {title: (seeds, "oracle-strict") for title, seeds in runs.items()},
                "held-out pictures that show what was asked, drawn with guidance")
    lines = []
    for drawing, how in zip(drawings, ("with guidance", "without")):
        lines += ["", f"Drawn {how}:", "", *stage_table(runs, JUDGES[:3], drawing), "",
                  *compare_runs(runs, JUDGES[:3], drawing)]
    rows = rollout.category_rows(rollout.read_records(untrained().drawn(0, drawings[0])))
    for category, of in rows.items():
        lines += ["", f"{category}, with guidance:", "", *compare_runs(runs, ["oracle-strict"], rows=of)]
    lines += ["", "| rms | conditional velocity moved | unconditional moved | difference of the two |",
              "|---|---|---|---|"]
    roots = {"base": [TINY / "model"]} | {title: [run.folder / "model" for run in seeds]
                                          for title, seeds in runs.items()}
    for title, seeds in roots.items():
        moved = np.mean([branch_drift(root) for root in seeds], axis=0)
        lines.append(f"| {title} | {' | '.join(f'{rms:.3f}' for rms in moved)} |")
    return lines


@torch.no_grad()
def branch_drift(root, prompts=60):
    """rms change of the conditional and of the unconditional velocity since the base, and rms of their
    difference, at states through which the base comes on held-out prompts.
    """
    device = torch.device("cpu")
    grid, t, cfg = model.sampling_settings(TINY / "model")
    base, trained = (model.materialise(model.new_transformer(of, torch.float32), of, device)
                     for of in (TINY / "model", root))
    heldout = model.load_prompts(TINY / "heldout.jsonl")
    requests = dict(enumerate(heldout[::len(heldout) // prompts]))
    encoded = model.encode_prompts(TINY / "model", model.load_vae(TINY / "model", device, torch.float32),
                                   requests, grid, device)
    drawn = model.sample(model.Sampler(base, False), encoded, [(0, i, 0) for i in requests], grid, t,
                         torch.zeros_like(t[:-1]), cfg, 0, 64, range(len(t) - 1))
    squares = []
    for part, _, states in drawn:
        for row, (_, i, _) in enumerate(part):
            x = torch.stack([x_k[row] for x_k, _ in states.values()])                             # (T, N, C)
            old, new = ([network.velocity(x, t[:-1], network.prefix([branch], grid)) for branch in encoded[i]]
                        for network in (base, trained))
            moved = new[0] - old[0], new[1] - old[1], new[0] - new[1]
            squares.append([float(v.square().mean()) for v in moved])
    return np.sqrt(np.mean(squares, axis=0))


def together_means(runs, steps, judges=("oracle-palette", "oracle-aesthetic")):
    """Means of two judges over all seeds after so many steps, a point of a chart."""
    if not steps:
        runs = [untrained()]
    return tuple(float(np.mean([rollout.mean(run.scores(judge, steps)) for run in runs])) for judge in judges)


def timesteps():
    """Sec. 4.2: training on all timesteps is said to hack the reward. On the naive scorer, which looks at the
    palette alone, without a KL.
    """
    flags = ("--reward", f"palette={TINY / 'world.py'}:palette_reward", "--kl-coef", "0", "--lr", "2.56e-4")
    sets = {"2 of the noisier half": "2", "the noisier half": "half", "all": "all"}
    runs = {f"{script}, {title}": [Run(f"{script.lower()}.py", f"palette {spec}", seed,
                                       (*flags, "--train-timesteps", spec), (20, 40, 80))
                                   for seed in range(SEEDS)]
            for script in ("GRPO", "NFT") for title, spec in sets.items()}
    queue(untrained(), *(run for seeds in runs.values() for run in seeds))
    curves = {title: [together_means(seeds, steps) for steps in (0, *seeds[0].stages)]
              for title, seeds in runs.items()}
    model.line_chart(ASSETS / "timesteps.png", curves, "the judge, by the proxy that is trained on",
                     "proxy: closeness to the palette")
    lines = stage_table(runs, JUDGES[1:])
    for script in ("GRPO", "NFT"):
        lines += ["", *compare_runs({title: of for title, of in runs.items() if script in title}, JUDGES[1:])]
    return lines


def curation():
    """Sec. 4.2: prompts whose images all score alike are filtered out. The strict reward on a pool of which
    half is nearly always right or wrong, against what rollout.py keeps of it, on other noise.
    """
    pool, curated = BUILD / f"{base()}-pool.jsonl", BUILD / f"{base()}-curated.jsonl"
    if not curated.exists():
        prepare_pool(pool, curated)
    flags = ("--reward", STRICT, *STRICT_FLAGS["GRPO"], "--prompts")
    runs = {name: [Run("grpo.py", f"curation {name}", seed, (*flags, str(path)), (50, 100))
                   for seed in range(SEEDS)] for name, path in (("pool", pool), ("curated", curated))}
    queue(untrained(), *(run for seeds in runs.values() for run in seeds))
    lines = []
    for (name, seeds), path in zip(runs.items(), (pool, curated)):
        constant = np.mean([json.loads(line)["constant_groups"] for run in seeds
                            for line in (run.folder / "log.jsonl").open()])
        lines.append(f"{name}: {len(path.read_text().splitlines())} prompts, {constant:.0%} constant groups")
    return [*lines, "", *stage_table(runs, JUDGES[:3]), "", *compare_runs(runs, JUDGES[:3])]


def prepare_pool(pool, curated, group=16):
    """The quarter of the tiny prompts that are most often all right or all wrong, the quarter that are least,
    and what is curated of them.
    """
    prompts, (once, again) = TINY / "prompts.jsonl", (f"{base()}-{name}" for name in ("every", "pool"))
    finish(start("rollout.py", "--name", once, "--prompts", str(prompts), "--reward", STRICT, "--group-size",
                 str(group)))
    share = rollout.score_array(rollout.read_records(ROOT / "rollouts" / once), "strict").mean(1)
    lines, order = prompts.read_text().splitlines(), np.argsort(-abs(share - 0.5), kind="stable")
    quarter = len(lines) // 4
    BUILD.mkdir(parents=True, exist_ok=True)
    pool.write_text("".join(f"{lines[i]}\n" for i in (*order[:quarter], *order[-quarter:])))
    finish(start("rollout.py", "--name", again, "--prompts", str(pool), "--reward", STRICT, "--seed", "1"))
    finish(start("rollout.py", "--curate", f"rollouts/{again}", "--min-range", "0", "--out", str(curated)))


def paradigms(wrong=(0, 0.1, 0.25), steps=1000):
    """Sec. 3.1, Fig. 2: reward models of scores are said to beat those of preferences. Here from the same
    pictures by the same criterion, some of the labels wrong: another picture's score, a pair turned round.
    """
    folder, kinds = BUILD / f"{base()}-paradigms-{steps}", {
        "scores": ("--objective", "pointwise", "--batch", "32"),
        "preferences": ("--objective", "pairwise", "--batch", "16")}  # as many pictures
    if not (folder / f"preferences-{100 * wrong[-1]:.0f}.jsonl").exists():
        label_pictures(folder, wrong)
    return tune_and_train("aesthetic", {
        f"{kind}, {share:.0%} wrong": (folder / f"{kind}-{100 * share:.0f}", "--steps", str(steps), *flags)
        for share in wrong for kind, flags in kinds.items()})


def reasoning(steps=1500):
    """Sec. 3: chain of thought before the alignment's score; the same pictures with and without."""
    folder = BUILD / f"{base()}-reasoning-{steps}"
    if not (folder / "without.jsonl").exists():
        records = score_pictures("alignment", folder, drawn=5000)
        plain = [{key: value for key, value in record.items() if key != "reasoning"} for record in records]
        make.write_lines(folder / "with.jsonl", records)
        make.write_lines(folder / "without.jsonl", plain)
    return tune_and_train("alignment", {name: (folder / name, "--steps", str(steps))
                                        for name in ("with", "without")})


def score_pictures(reward, folder, spoiled=0, drawn=0):
    """Samples of the base for the training prompts, so many of them spoiled, and so many drawings, scored by
    the oracle: records. The held-out ones go into the same folder.
    """
    rng = np.random.default_rng(0)
    train, heldout = ([record["prompt"] for record in make.read_lines(TINY / name)]
                      for name in ("prompts.jsonl", "heldout.jsonl"))
    samples = make.base_samples(train, 16, 0)
    more = make.spoiled_samples(rng, samples, spoiled) + make.drawn_samples(rng, drawn)
    parts = {"train": samples + more, "drawn": make.drawn_samples(rng, 400),
             "samples": make.base_samples(heldout, 4, 1)}
    for part, rows in parts.items():
        make.write_scores(reward, part, rows, getattr(world, f"{reward}_reward"), folder)
    return make.read_lines(folder / f"{reward}-train.jsonl")


def label_pictures(folder, wrong):
    """The same pictures as scores and as pairs of a prompt's, shares of them wrong."""
    records, rng = score_pictures("aesthetic", folder, spoiled=4000), np.random.default_rng(1)
    pairs = make.pairs(rng, records)
    for share in wrong:
        others = rng.permutation(len(records))
        points = [record | {"score": records[other]["score"]} if rng.random() < share else record
                  for record, other in zip(records, others)]
        turned = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
                  if rng.random() < share else pair for pair in pairs]
        make.write_lines(folder / f"scores-{100 * share:.0f}.jsonl", points)
        make.write_lines(folder / f"preferences-{100 * share:.0f}.jsonl", turned)


def tune_and_train(reward, scorers):
    """Reward models of a kind, and policies trained on each; scorers {title: (where it is to be, its data
    beside that, flags)}.
    """
    if not make.READER.exists():
        finish(start("-c", "import sys; sys.path.insert(0, 'tests/tiny'); import make; make.make_reader()"))

    def tune(folder, *flags):
        resume = ["--resume"] if Path(f"{folder}.part").exists() else []
        if not folder.exists():
            finish(start("train_reward.py", "--reward", reward, *resume, "--base", str(make.READER),
                         "--processor", str(make.OUT / "processor"), "--pixels", str(make.SCORER_PIXELS),
                         *flags, "--data", f"{folder}.jsonl", "--out", str(folder), "--eval-data",
                         *(str(folder.parent / f"{reward}-{part}.jsonl") for part in make.PARTS)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda scorer: tune(*scorer), scorers.values()))
    runs = {title: [Run("grpo.py", f"{folder.parent.name.partition('-')[2]} {folder.name}", seed,
                        ("--reward", f"{reward}={folder}")) for seed in range(SEEDS)]
            for title, (folder, *_) in scorers.items()}
    queue(untrained(), *(run for seeds in runs.values() for run in seeds))
    lines = ["| one scorer each | SRCC: drawings, samples, in groups | rises in training, in its units |",
             "|---" * 3 + "|"]
    for title, (folder, *_) in scorers.items():
        drawn, samples = json.loads((folder / "reward.json").read_text())["held_out"].values()
        found = ", ".join(f"{of.get(kind) or math.nan:.2f}" for of, kind in (
            (drawn, "srcc"), (samples, "srcc"), (samples, "group_srcc")))
        own = " / ".join(f"{rise(run, reward):+.2f}" for run in runs[title])
        lines.append(f"| {title} | {found} | {own} |")
    titles = list(runs)
    for pair in zip(titles[::2], titles[1::2]):  # the two kinds with as many wrong labels
        lines += ["", *compare_runs({title: runs[title] for title in pair}, JUDGES[1:4])]
    return lines


def rise(run, reward, count=5):
    """What a training's own reward rose by, from its first steps to its last."""
    means = [json.loads(line)["reward"][reward] for line in (run.folder / "log.jsonl").open()]
    return np.mean(means[-count:]) - np.mean(means[:count])


def objective():
    """What Eq. 6 leaves open, on the strict reward: how steps weigh, noise, which steps, group size with as
    many pictures, KL, and scores that fail.
    """
    kl, lr = ("--kl-coef", "0.1"), ("--lr", "2.56e-4")
    settings = {
        "default": kl,
        "weights as printed": ("--printed-ratio", "--kl-coef", "0.5", "--clip-eps", "0.075", "--grad-clip",
                               "5"),
        "2 steps": (*kl, "--train-timesteps", "2"), "all steps": (*kl, "--train-timesteps", "all"),
        "noise 1.2": (*kl, "--noise-level", "1.2"), "no KL": ("--kl-coef", "0"),
        "KL 0.4": ("--kl-coef", "0.4"),
        "32 groups of 4": (*kl, "--prompts-per-step", "32", "--group-size", "4"),
        "8 groups of 16": (*kl, "--prompts-per-step", "8", "--group-size", "16"),
        "5% of scores fail": kl, "20% of scores fail": kl}
    runs = {}
    for title, flags in settings.items():
        reward = STRICT
        if "fail" in title:
            reward = f"strict={Path(__file__).resolve()}:fails_{title.split('%')[0]}"
            flags += ("--max-reward-failures", "1")
        runs[title] = [Run("grpo.py", f"objective {title}", seed, ("--reward", reward, *lr, *flags), (40,))
                       for seed in range(SEEDS)]
    queue(untrained(), *(run for seeds in runs.values() for run in seeds))
    return [*stage_table(runs, JUDGES[:3]), "", *compare_runs(runs, JUDGES[:3])]


def fails(share, *asked):
    """The strict reward, of which a share fails, always for the same pictures."""
    return [math.nan if random.Random(image.tobytes()).random() < share else score
            for image, score in zip(asked[0], world.strict_reward(*asked))]


def fails_5(images, prompts, sources):
    return fails(0.05, images, prompts, sources)


def fails_20(images, prompts, sources):
    return fails(0.2, images, prompts, sources)


def weights():
    """Eq. 13: every reward is normalised on its own before they are added up, against the sum of raw scores,
    one of them on a scale ten times the other's. Sec. 3.2: weights of a category's own against one vector.
    """
    rewards = STRICT, f"tenfold={Path(__file__).resolve()}:tenfold"
    scripts = {"each normalised": "grpo.py",
               "raw sum": patched(ROOT / "tests" / "forks" / "rawsum.patch", BUILD / "forks" / "rawsum")}
    sums = {title: [Run(str(script), title, seed, ("--reward", *rewards, "--lr", "2.56e-4"), (40,))
                    for seed in range(SEEDS)] for title, script in scripts.items()}
    one, names = BUILD / "one_vector.json", ("alignment", "aesthetic", "portrait")
    one.write_text(json.dumps({"rewards": {name: {"weight": 1 / len(names)} for name in names}}))
    own = [teach("nft.py", seed)["t2i"] for seed in range(SEEDS)]
    same = [run._replace(what="one vector", flags=("--reward", str(one), *run.flags[2:])) for run in own]
    drawing = own[0].drawings[0]
    queue(untrained(Drawing(), drawing), *own, *same, *(run for seeds in sums.values() for run in seeds))
    lines = compare_runs(sums, JUDGES[1:3])
    vectors = {title: [judged(last_drawn(run, drawing)) for run in runs]
               for title, runs in {"weights by category": own, "one vector": same}.items()}
    drawn = untrained().drawn(0, drawing)
    before, rows = judged(drawn), rollout.category_rows(rollout.read_records(drawn))
    for category in ("portrait", "typography", "relation"):
        judges = [f"oracle-{name}" for name in names if name != "portrait" or category == "portrait"]
        lines += ["", f"{category}:", "",
                  *compare({judge: before[judge] for judge in judges}, vectors, rows[category])]
    return lines


def tenfold(images, prompts, sources):
    """The oracle's aesthetic, on a scale ten times that of strict"""
    return [10 * (score - 1) / 4 for score in world.aesthetic_reward(images, prompts, sources)]


def forks(seconds=240):
    """The patches in tests/forks against the scripts they are of, as many seconds of training each, on the
    aesthetic and the strict reward; ReFL, which needs a gradient, on the naive one alone.
    """
    sources = {"aesthetic": "aesthetic", "strict": STRICT,
               "palette": f"palette={ROOT / 'tests' / 'forks' / 'palette.py'}:palette"}
    scripts = {"grpo": "grpo.py", "nft": "nft.py"} | {
        patch.stem: patched(patch, BUILD / "forks" / patch.stem)
        for patch in sorted((ROOT / "tests" / "forks").glob("*.patch"))}
    cases = [(name, reward) for name in scripts if name not in ("refl", "rawsum")
             for reward in ("aesthetic", "strict")] + [("grpo", "palette"), ("refl", "palette")]
    steps = {}
    for name, reward in cases:  # one after the other: what runs beside them must not count
        pilot = Run(str(scripts[name]), f"pilot {name} {reward}", 0, ("--reward", sources[reward]))
        train_up_to(pilot, 6)
        steps[name, reward] = max(1, round(seconds / seconds_per_step(pilot)))
    runs = {(name, reward): [Run(str(scripts[name]), f"{name} {reward}", seed, ("--reward", sources[reward]),
                                 (steps[name, reward],)) for seed in range(SEEDS)] for name, reward in cases}
    queue(untrained(), *(run for seeds in runs.values() for run in seeds))
    lines = [f"| trained on | by | steps in {seconds} s | {' | '.join(JUDGES)} |", "|---" * (3 + len(JUDGES))
             + "|"]
    for (name, reward), seeds in runs.items():
        gains = [" / ".join(f"{gain(run, judge)[0]:+.3f}" for run in seeds) for judge in JUDGES]
        lines.append(f"| {reward} | {name} | {steps[name, reward]} | {' | '.join(gains)} |")
    return lines


def patched(patch, folder):
    """A fork's script, in a directory of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("model.py", "grpo.py", "nft.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").symlink_to(ROOT / "tests")
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # not for the repository
    subprocess.run(["git", "apply", str(patch)], cwd=folder, env=apart, check=True)
    return folder / ("nft.py" if "a/nft.py" in patch.read_text() else "grpo.py")


def seconds_per_step(run):
    """Of a run's steps but the first, which warms up."""
    seconds = step_seconds(run)[1:]
    return sum(seconds) / len(seconds)


PARTS = {part.__name__: part for part in (first, strict, chain, guidance, timesteps, curation, distillation,
                                          paradigms, weights, reasoning, objective,
                                          forks)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=PARTS)
    ASSETS.mkdir(exist_ok=True)
    for part in parser.parse_args().part:
        print("\n".join(PARTS[part]()))
