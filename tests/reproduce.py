"""Make the README's numbers and pictures; every part prints its table and writes its pictures, if it has any,
into assets/.

    python tests/reproduce.py first        # the first command in three seeds: 20 minutes
    python tests/reproduce.py paradigms    # Sec. 3.1, Fig. 2: pointwise against pairwise rewards: 30 minutes
    python tests/reproduce.py curation     # Sec. 4.2: curated against uncurated prompts: an hour
    python tests/reproduce.py nft          # DiffusionNFT on one reward, on several, on edits: 45 minutes
    python tests/reproduce.py opd          # Sec. 4.3: teachers, Mix-RL, the distilled student: an hour
    python tests/reproduce.py objective    # Eq. 6: weights and number of steps, noise, KL: two hours
    python tests/reproduce.py strategies   # Sec. 4.1, 4.2, Fig. 3: CFG strategies, timesteps: an hour
    python tests/reproduce.py forks        # the algorithms in tests/forks, at equal time: three hours

Trainings of strategies, objective, opd and the several rewards of nft run side by side, one for every core.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]

import model
import rollout
import world

ASSETS, TINY, BUILD = ROOT / "assets", ROOT / "tests" / "tiny", ROOT / "tests" / "tiny" / "build"
ORACLES = [f"oracle-{name}={TINY / 'world.py'}:{name}_reward"
           for name in ("aesthetic", "strict", "alignment")]
SEEDS = 3
# rewards, prompts, steps; held-out prompts, images of each
TASKS = {"t2i": ("rewards.json", "prompts.jsonl", 20, "heldout.jsonl", 6),
         "edit": ("rewards_edit.json", "edits.jsonl", 40, "edits_heldout.jsonl", 13)}


def start(*arguments):
    """A script of this repository as a process."""
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT)


def grpo(name, reward, seed, *more):
    """The first command with the oracle as judge, as a process; an old run of that name is removed unless it
    is resumed.
    """
    if "--resume" not in more:
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    return start("grpo.py", "--reward", reward, "--judge", *ORACLES, "--seed", str(seed), "--name", name,
                 *more)


def finish(process):
    if process.wait():
        raise SystemExit(f"{' '.join(process.args)} failed")


def side_by_side(commands):
    """Run commands, each a list of arguments, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: finish(start(*command)), commands))


def training(script, name, seed, *arguments):
    """The command of a run without a final table; an old run of that name is removed."""
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    return [script, "--seed", str(seed), "--name", name, "--eval-images", "0", "--sample-every", "0",
            *arguments]


def drawing(name, model, prompts, rewards, *arguments):
    """The command that draws and scores held-out prompts, anew."""
    shutil.rmtree(ROOT / "rollouts" / name, ignore_errors=True)
    return ["rollout.py", "--name", name, "--model", str(model), "--prompts", str(TINY / prompts), "--reward",
            *rewards, *arguments]


def evaluation(name):
    return json.loads((ROOT / "runs" / name / "eval.json").read_text())["rewards"]


def cells(row):
    low, high = row["interval"]
    return f"{row['base']:.3f} | {row['trained']:.3f} | {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def seed_table(script, name):
    """The first command by one of the training scripts, one seed after another: gains over the base, and the
    time it took.
    """
    runs = [f"reproduce-{name}-{seed}" for seed in range(SEEDS)]
    seconds, rows = [], {}
    for seed, run in enumerate(runs):
        shutil.rmtree(ROOT / "runs" / run, ignore_errors=True)
        began = time.time()
        finish(start(script, "--reward", "aesthetic", "--judge", *ORACLES, "--seed", str(seed), "--name",
                     run))
        seconds.append(time.time() - began)
        for judge, row in evaluation(run).items():
            rows.setdefault(judge, []).append(row)
    lines = [f"| {script} | base | {' | '.join(f'seed {seed}' for seed in range(SEEDS))} |",
             "|---" * (2 + SEEDS) + "|"]
    for judge, found in rows.items():
        gains = (f"{row['difference']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]"
                 for row in found)
        lines.append(f"| {judge} | {sum(row['base'] for row in found) / SEEDS:.3f} | {' | '.join(gains)} |")
    return [*lines, f"| seconds | | {' | '.join(f'{s:.0f}' for s in seconds)} |"]


def first():
    lines = seed_table("grpo.py", "grpo")
    shutil.copy(ROOT / "runs" / "reproduce-grpo-0" / "samples" / "before_after.png",
                ASSETS / "grpo_before_after.png")
    logs = [(ROOT / "runs" / f"reproduce-grpo-{seed}" / "log.jsonl").read_text().splitlines()
            for seed in range(SEEDS)]
    rewards = list(zip(*([json.loads(line)["reward"]["aesthetic"] for line in log] for log in logs)))
    name = f"mean and range of {SEEDS} seeds"
    model.line_chart(ASSETS / "grpo_curve.png",
                     {name: [(step, sum(values) / SEEDS) for step, values in enumerate(rewards)]},
                     "aesthetic score of the rollouts", "step",
                     bands={name: [(step, min(values), max(values)) for step, values in enumerate(rewards)]})
    return lines


def paradigms():
    """The aesthetic scorer of the tiny world, and its twin trained for as many steps on as many pictures as
    preferences.

    GRPO on the first is what `first` ran; its runs are needed.
    """
    pairs, twin = BUILD / "aesthetic-pairs.jsonl", BUILD / "rewards" / "pairwise"
    if not pairs.exists() or not (ROOT / "runs" / f"reproduce-grpo-{SEEDS - 1}" / "eval.json").exists():
        raise SystemExit("paradigms needs: python tests/tiny/make.py --only scores && python "
                         "tests/reproduce.py first")
    if not twin.exists():
        finish(start("train_reward.py", "--reward", "aesthetic", "--objective", "pairwise", "--data",
                     str(pairs), "--eval-data",
                     *(str(BUILD / f"aesthetic-{part}.jsonl") for part in ("drawn", "samples")), "--out",
                     str(twin),
                     "--batch", "16", "--steps", "1500", "--pixels", str(192 * 192)))
    lines = ["| scorer | drawings SRCC | PLCC | pairs | base samples SRCC | pairs | within groups |",
             "|---|---|---|---|---|---|---|"]
    for name, directory in {"pointwise": TINY / "model" / "rewards" / "aesthetic", "pairwise": twin}.items():
        drawn, samples = json.loads((directory / "reward.json").read_text())["held_out"].values()
        cells = [drawn["srcc"], drawn["plcc"], drawn["pair_accuracy"],
                 samples["srcc"], samples["pair_accuracy"], samples["group_srcc"]]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    lines += ["", "| trained on | seed | judge | base | trained | difference [95% interval] |",
              "|---|---|---|---|---|---|"]
    for seed in range(SEEDS):
        finish(grpo(f"reproduce-pairwise-{seed}", f"pairwise={twin}", seed))
        lines += [f"| {name} | {seed} | {judge} | {cells(row)} |"
                  for name, run in (("pointwise", "grpo"), ("pairwise", "pairwise"))
                  for judge, row in evaluation(f"reproduce-{run}-{seed}").items()]
    grids = [ROOT / "runs" / f"reproduce-{run}-0" / "samples" / "before_after.png"
             for run in ("grpo", "pairwise")]
    stack([Image.open(grid) for grid in grids], ASSETS / "paradigms.png")
    return lines


def curation(stages=(15, 30, 45)):
    """The half of every category's prompts with the largest ranges against as many at random, judged during
    training.
    """
    pool, curated = ROOT / "rollouts" / "reproduce-pool", ROOT / "runs" / "reproduce-curated.jsonl"
    curated.parent.mkdir(exist_ok=True)
    finish(start("rollout.py", "--prompts", str(TINY / "prompts.jsonl"), "--reward", "aesthetic", "--name",
                 pool.name))
    finish(start("rollout.py", "--curate", str(pool), "--out", str(curated)))
    prompts = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text().splitlines()]
    kept = Counter(json.loads(line)["category"] for line in curated.read_text().splitlines())
    table, gains = [], {"curated": {}, "uncurated": {}}
    for seed in range(SEEDS):
        random.Random(seed).shuffle(prompts)
        chosen = [line for name, count in kept.items()
                  for line in [p for p in prompts if p["category"] == name][:count]]
        uncurated = ROOT / "runs" / f"reproduce-uncurated-{seed}.jsonl"
        uncurated.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        for kind, path in (("curated", curated), ("uncurated", uncurated)):
            for steps in stages:
                name = f"reproduce-{kind}-{seed}"
                finish(grpo(name, "aesthetic", seed, "--prompts", str(path), "--save-every", "15", "--steps",
                            str(steps),
                            *(["--resume"] if steps > stages[0] else [])))
                for judge, row in evaluation(name).items():
                    gains[kind].setdefault(judge, {}).setdefault(steps, []).append(row["difference"])
            table += [f"| {kind} | {seed} | {judge} | {cells(row)} |"
                      for judge, row in evaluation(name).items()]
    curves = {f"{kind}, {judge}": [(0, 0),
                                   *((steps, sum(values) / SEEDS)
                                     for steps, values in gains[kind][judge].items())]
              for judge in ("oracle-aesthetic", "aesthetic") for kind in gains}
    model.line_chart(ASSETS / "curation.png", curves,
                     f"gain over the base on held-out prompts, mean of {SEEDS} seeds", "step")
    return ["| prompts | seed | judge | base | trained | difference [95% interval] |",
            "|---|---|---|---|---|---|", *table]


def teacher(script, task, seed):
    """The command that trains on one task's rewards."""
    rewards, prompts, steps, heldout, _ = TASKS[task]
    return training(f"{script}.py", f"reproduce-{script}-{task}-{seed}", seed, "--reward",
                    str(TINY / rewards), "--prompts",
                    str(TINY / prompts), "--eval-prompts", str(TINY / heldout), "--steps", str(steps))


def pictures_of(task, kind, seed):
    """Where the pictures of a task's held-out prompts by a run are."""
    return ROOT / "rollouts" / f"reproduce-{kind}-{seed}-on-{task}"


def drawing_of(task, kind, seed):
    """The command that draws a task's held-out prompts by a run, or by the "base" or the "unguided" base, and
    scores them.
    """
    rewards, _, _, heldout, images = TASKS[task]
    root = TINY / "model" if kind in ("base",
                                      "unguided") else ROOT / "runs" / f"reproduce-{kind}-{seed}" / "model"
    return drawing(pictures_of(task, kind, seed).name, root, heldout, [str(TINY / rewards)], "--group-size",
                   str(images),
                   *(["--cfg", "1"] if kind == "unguided" else []))


def nft():
    """The same bar as `first`, then several rewards with weights per category, then edits; judged on held-out
    prompts by rollout.py.
    """
    lines = seed_table("nft.py", "nft")
    side_by_side([teacher("nft", task, seed) for task in TASKS for seed in range(SEEDS)])
    side_by_side([drawing_of(task, f"nft-{task}", seed) for task in TASKS for seed in range(SEEDS)]
                 + [drawing_of(task, "base", 0) for task in TASKS])
    for task in TASKS:
        out = Path("rollouts") / f"reproduce-nft-{task}"
        players = [f"seed-{seed}={pictures_of(task, f'nft-{task}', seed)}" for seed in range(SEEDS)]
        finish(start("rollout.py", "--out", str(out), "--compare", f"base={pictures_of(task, 'base', 0)}",
                     *players))
        table = (ROOT / out / "comparison.md").read_text().splitlines()
        lines += ["", f"{task}:",
                  *[line for line in table if line.startswith(("| category", "| ---", "| all"))][:8]]
    return lines


def opd():
    """Teachers of both tasks (the runs of `nft`), the same by GRPO, Mix-RL with as many images, and the
    student, on both tasks.

    Every model is drawn with guidance but the student. The composite is what they were trained on; the oracle
    says which pictures show exactly what was asked.
    """
    for seed in range(SEEDS):
        if not (pictures_of("edit", "nft-edit", seed) / "rollouts.jsonl").exists():
            raise SystemExit("opd needs: python tests/reproduce.py nft")
    commands = [teacher("grpo", task, seed) for task in reversed(TASKS) for seed in range(SEEDS)]
    for seed in range(SEEDS):
        commands.append(training("nft.py", f"reproduce-mix-{seed}", seed, "--reward",
                                 str(TINY / "rewards_mixed.json"), "--prompts",
                                 str(TINY / "mixed.jsonl"), "--steps",
                                 str(sum(task[2] for task in TASKS.values()))))
        commands.append(training("opd.py", f"reproduce-opd-{seed}", seed, "--teacher",
                                 *(f"{task}=runs/reproduce-nft-{task}-{seed}/model" for task in TASKS)))
    side_by_side(commands)
    kinds = {"nft-t2i": "T2I teacher", "nft-edit": "edit teacher", "mix": "Mix-RL",
             "opd": "student, unguided",
             "grpo-t2i": "T2I teacher by GRPO", "grpo-edit": "edit teacher by GRPO"}
    cells = [(task, kind, 0) for kind in ("base", "unguided") for task in TASKS]
    cells += [(task, kind, seed) for kind in kinds for task in TASKS if "grpo" not in kind or task in kind
              for seed in range(SEEDS)]
    # `nft` has drawn those
    side_by_side([drawing_of(*cell) for cell in cells if cell[1] not in ("base", f"nft-{cell[0]}")])
    records = {cell: rollout.read_records(pictures_of(*cell)) for cell in cells}
    shown = {task: [rollout.by_prompt(records[task, "base", 0])[i] for i in chosen]
             for task, chosen in {"t2i": (0, 20, 40, 60), "edit": (0, 4, 16, 20)}.items()}
    rows = [[("", Image.new("RGB", (96, 96), "white")) for _ in shown["t2i"]]
            + [("", Image.open(r["folder"] / r["source"][0])) for r in shown["edit"]]]
    labels = {"base": "base", "unguided": "base, unguided", **dict(list(kinds.items())[:4])}
    for kind in labels:
        rows.append([(r["prompt"], Image.open(pictures_of(task, kind, 0) / r["file"]))
                     for task in TASKS for r in shown[task]])
    model.contact_sheet(ASSETS / "opd.png", *rows, titles=("source", *labels.values()))
    return opd_table(records, kinds)


def opd_table(records, kinds):
    """Means of the base and gains over the guided base in every seed, and which part of its teachers' gains
    the student has.
    """
    lines = ["| | t2i composite | t2i strict | edit composite | edit strict |", "|---|---|---|---|---|"]
    scores = {key: [rollout.score_array(of, "composite"), oracle_strict(of)] for key, of in records.items()}
    for kind in ("base", "unguided"):
        cells = [f"{rollout.mean(array):.3f}" for task in TASKS for array in scores[task, kind, 0]]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    gain = lambda task, kind, seed, i=0: rollout.mean_difference(scores[task, "base", 0][i],
                                                                 scores[task, kind, seed][i])
    for kind, label in kinds.items():
        cells = [" / ".join(f"{gain(task, kind, seed, i)[0]:+.3f}"
                            for seed in range(SEEDS) if (task, kind, seed) in records)
                 for task in TASKS for i in (0, 1)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| task | seed | teacher's gain [95% interval] | student's [95% interval] | share |",
              "|---|---|---|---|---|"]
    for task in TASKS:
        for seed in range(SEEDS):
            rows = gain(task, f"nft-{task}", seed), gain(task, "opd", seed)
            both = " | ".join(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in rows)
            lines.append(f"| {task} | {seed} | {both} | {rows[1][0] / rows[0][0]:.0%} |")
    for seed in range(SEEDS):
        log = [json.loads(line)["seconds"]
               for line in (ROOT / "runs" / f"reproduce-opd-{seed}" / "log.jsonl").open()]
        swap, total = (sum(sum(line[part] for part in parts) for line in log) for parts in (["swap"], log[0]))
        lines.append(f"seed {seed}: {total / len(log):.1f} s a step, {swap / total:.2%} of it for swapping "
                     "teachers")
    return lines


def oracle_strict(records):
    """1 where the oracle sees exactly what was asked, else 0: (P, G)."""
    images, sources = [], []
    for record in records:
        images.append(Image.open(record["folder"] / record["file"]))
        sources.append([Image.open(record["folder"] / path) for path in record["source"]])
    strict = world.strict_reward(images, [record["prompt"] for record in records], sources)
    return rollout.score_array([record | {"rewards": {"strict": score}}
                                for record, score in zip(records, strict)], "strict")


def strategies(steps=24, guidances=(2, 1)):
    """Hybrid guidance and trained timesteps at high noise (the defaults) against the alternatives: training
    on the aesthetic reward with all seeds, held-out prompts drawn with and without guidance, judged by the
    reward and by the oracle."""
    alternatives = {"default": [], "guided in both": ["--guided-objective"],
                    "guided in neither": ["--cfg", "1"],
                    "all timesteps": ["--train-timesteps", "all"]}
    labels = [f"{script} {label}" for script in ("grpo", "nft") for label in alternatives]
    runs = {(label, seed): f"reproduce-{label.replace(' ', '-')}-{seed}" for label in labels
            for seed in range(SEEDS)}
    side_by_side([training(f"{label.split()[0]}.py", name, seed, "--reward", "aesthetic", "--steps",
                           str(steps),
                           *alternatives[label.split(" ", 1)[1]]) for (label, seed), name in runs.items()])
    models = {("base", 0): TINY / "model"} | {key: ROOT / "runs" / name / "model"
                                              for key, name in runs.items()}
    names = {(*key, cfg): f"reproduce-{key[0].replace(' ', '-')}-{key[1]}-cfg{cfg}" for key in models
             for cfg in guidances}
    side_by_side([drawing(name, models[label, seed], "heldout.jsonl", ["aesthetic", *ORACLES], "--group-size",
                          "2", "--cfg", str(cfg))
                  for (label, seed, cfg), name in names.items()])
    records = {key: rollout.read_records(ROOT / "rollouts" / name) for key, name in names.items()}
    rows = [(label, cfg) for label in ("base", *labels) for cfg in guidances]
    model.contact_sheet(ASSETS / "strategies.png", *(
        [(record["prompt"], Image.open(record["folder"] / record["file"]))
         for record in rollout.by_prompt(records[label, 0, cfg])[:8]] for label, cfg in rows),
        titles=tuple(f"{label}, cfg {cfg}" for label, cfg in rows))
    curves = {}
    for label in labels:
        logs = [[json.loads(line)["reward"]["aesthetic"]
                 for line in (ROOT / "runs" / runs[label, seed] / "log.jsonl").open()]
                for seed in range(SEEDS)]
        means = [sum(values) / SEEDS for values in zip(*logs)]
        curves[label] = [(step, sum(means[step - 5:step]) / 5) for step in range(5, steps + 1)]
    model.line_chart(ASSETS / "strategies_curves.png", curves,
                     f"reward of the rollout, mean of {SEEDS} seeds and 5 steps", "step")
    return strategy_table(records, labels, guidances)


def strategy_table(records, labels, guidances):
    """Means of the base and gains over it in every seed, drawn with the same guidance."""
    rewards = rollout.reward_names(records["base", 0, guidances[0]])[:-1]
    lines = [f"| trained | drawn with guidance | {' | '.join(rewards)} |", "|---" * (2 + len(rewards)) + "|"]
    for cfg in guidances:
        base = {reward: rollout.score_array(records["base", 0, cfg], reward) for reward in rewards}
        lines.append(f"| base | {cfg} | "
                     f"{' | '.join(f'{rollout.mean(base[reward]):.3f}' for reward in rewards)} |")
        for label in labels:
            gains = [[rollout.mean_difference(base[reward],
                                              rollout.score_array(records[label, seed, cfg], reward))[0]
                      for seed in range(SEEDS)] for reward in rewards]
            lines.append(f"| {label} | {cfg} | "
                         f"{' | '.join(' / '.join(f'{gain:+.2f}' for gain in row) for row in gains)} |")
    return lines


# kappa_t sqrt(D) of the four steps is 4.8 (rms), and by so much gradient and spread of the printed ratio
# exceed the default's
PRINTED = ["--printed-ratio", "--kl-coef", "1.25", "--clip-eps", "0.075", "--grad-clip", "5"]
VARIANTS = {
    "default": [], "--printed-ratio": PRINTED, "--train-timesteps all": ["--train-timesteps", "all"],
    "--noise-level 1.2": ["--noise-level", "1.2"], "--kl-coef 0.1": ["--kl-coef", "0.1"]}
OBJECTIVES = {  # trained on: what differs from the default
    "strict": ["default", "--printed-ratio", "--train-timesteps all", "--noise-level 1.2", "--kl-coef 0.1"],
    "aesthetic": ["default", "--printed-ratio", "--train-timesteps all", "--noise-level 1.2"]}


def objective_name(reward, kind, seed):
    return "-".join(["reproduce", reward, *kind.replace("--", "").split(), str(seed)])


def objective_training(reward, kind, seed):
    source, steps = {"aesthetic": ("aesthetic", 60),
                     "strict": (f"strict={TINY / 'world.py'}:strict_reward", 100)}[reward]
    return training("grpo.py", objective_name(reward, kind, seed), seed, "--reward", source, "--steps",
                    str(steps),
                    *VARIANTS[kind])


def objective_drawing(reward, kind, seed):
    root = TINY / "model" if reward == "base" else ROOT / "runs" / objective_name(reward, kind,
                                                                                  seed) / "model"
    return drawing(objective_name(reward, kind, seed), root, "heldout.jsonl", ["aesthetic", *ORACLES],
                   "--group-size", "6")


def objective():
    """grpo.py's default against other objectives on the VLM's aesthetic reward and the oracle's strict one;
    held-out prompts drawn by the ODE.
    """
    kinds = [(reward, kind) for reward, several in OBJECTIVES.items() for kind in several]
    cases = [(*pair, seed) for pair in kinds for seed in range(SEEDS)]
    side_by_side([objective_training(*case) for case in cases])
    side_by_side([objective_drawing(*case) for case in [("base", "", 0), *cases]])
    return gain_table({case: objective_name(*case) for case in [("base", "", 0), *cases]})


def gain_table(names):
    """Gains over the base, which is the first of {(trained on, what, seed): name under rollouts}, with 95%
    intervals over prompts.
    """
    records = {case: rollout.read_records(ROOT / "rollouts" / name) for case, name in names.items()}
    cases = list(records)
    judges = [judge for judge in rollout.reward_names(records[cases[0]]) if judge != "composite"]
    scores = {(case, judge): rollout.score_array(of, judge) for case, of in records.items()
              for judge in judges}
    lines = [f"| trained on | what | seed | {' | '.join(judges)} |", "|---" * (3 + len(judges)) + "|"]
    for case in cases[1:]:
        gains = [rollout.mean_difference(scores[cases[0], judge], scores[case, judge]) for judge in judges]
        shown = [f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]" for gain, low, high in gains]
        lines.append(f"| {' | '.join([*map(str, case), *shown])} |")
    return lines


def forks(seconds=240):
    """The patches in tests/forks against the scripts they are of, as many seconds of training each, on the
    aesthetic and the strict reward; ReFL, which needs a gradient, on the naive one alone.
    """
    rewards = {"aesthetic": "aesthetic", "strict": f"strict={TINY / 'world.py'}:strict_reward"}
    palette = f"palette={ROOT / 'tests' / 'forks' / 'palette.py'}:palette"
    scripts = {"grpo": ROOT / "grpo.py", "nft": ROOT / "nft.py"} | {
        patch.stem: patched(patch, BUILD / "forks" / patch.stem)
        for patch in sorted((ROOT / "tests" / "forks").glob("*.patch"))}
    cases = [(reward, name, seed) for name in scripts if name not in ("refl", "rawsum") for reward in rewards
             for seed in range(SEEDS)]
    cases += [("palette", name, seed) for name in ("grpo", "refl") for seed in range(SEEDS)]
    sources = rewards | {"palette": palette}
    pilots = {case[:2]: f"reproduce-pilot-{case[0]}-{case[1]}" for case in cases}
    # one after the other: what runs beside them must not count
    for (reward, name), run in pilots.items():
        finish(start(*training(str(scripts[name]), run, 0, "--reward", sources[reward], "--steps", "6")))
    steps = {key: max(1, round(seconds / seconds_per_step(run))) for key, run in pilots.items()}
    runs = {case: f"reproduce-fork-{case[0]}-{case[1]}-{case[2]}" for case in cases}
    side_by_side([training(str(scripts[name]), run, seed, "--reward", sources[reward], "--steps",
                           str(steps[reward, name])) for (reward, name, seed), run in runs.items()])
    models = {"reproduce-fork-base": TINY / "model"} | {
        run: ROOT / "runs" / run / "model" for run in runs.values()}
    side_by_side([drawing(name, root, "heldout.jsonl", ["aesthetic", palette, *ORACLES], "--group-size", "2")
                  for name, root in models.items()])
    counts = [f"| {reward} | {name} | {count} |" for (reward, name), count in steps.items()]
    return [*gain_table({("base", "", 0): "reproduce-fork-base"} | runs), "",
            f"| trained on | what | steps in {seconds} s |", "|---|---|---|", *counts]


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
    lines = [json.loads(line) for line in (ROOT / "runs" / run / "log.jsonl").open()][1:]
    return sum(sum(line["seconds"].values()) for line in lines) / len(lines)


def stack(pictures, path):
    """Figures under each other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
    sheet.save(path)


PARTS = {"first": first, "paradigms": paradigms, "curation": curation, "nft": nft, "opd": opd,
         "objective": objective, "strategies": strategies, "forks": forks}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=PARTS)
    ASSETS.mkdir(exist_ok=True)
    for part in parser.parse_args().part:
        print("\n".join(PARTS[part]()))
