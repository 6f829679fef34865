"""Rewards: remote endpoints and their faults, face identity, reward files, failed scores, Eq. 13, and how
grpo.py waits.
"""

import gc
import json
import math
import re
import random
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import make
import model
import world
from grpo import StepScores, group_advantage
from judge_server import HANG_UP, Judge, choice, serve
from runs import checkpoint, loaded_rewards, run_script

ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / "tests/tiny/world.py"


def grey(level, mode="RGB"):
    return Image.new(mode, (32, 32), (level,) * 3 + (255,) * (len(mode) - 3))


def score_of(picture):
    """What `answered` means by its answer: 1 for a black picture, 5 for a white one."""
    return 1 + 4 * np.asarray(picture.convert("RGB"), np.float64).mean() / 255


def answered(picture, mass=0.9, digit="3"):
    """An answer whose probabilities at the digit, all on 1 and 5, say `score_of`."""
    high = (score_of(picture) - 1) / 4
    tops = {"1": mass * (1 - high), " 5": mass * high, digit: 0.0, " the": 1 - mass}
    tops = {token: math.log(max(p, 1e-12)) for token, p in tops.items()}
    return choice([("<", {"<": 0.0}), ("score", {"score": 0.0}), (">", {">": 0.0}), (digit, tops),
                   ("</score>", {"</score>": 0.0})])


@pytest.fixture
def patient(monkeypatch):
    """One retry, at once; a server that is not there is waited for half a second."""
    monkeypatch.setattr(model.RemoteScorer, "RETRIES", 1)
    monkeypatch.setattr(model.RemoteScorer, "AWAY", 0.5)
    monkeypatch.setattr(model.RemoteScorer, "PAUSE", 0.1)
    monkeypatch.setattr(model, "STOP",
                        SimpleNamespace(wait=lambda seconds: time.sleep(min(seconds, 0.1)),
                                        is_set=lambda: False))


# Remote endpoints


@pytest.mark.parametrize("name", ["aesthetic", "alignment"])
def test_remote_scores_equal_local_ones(name):
    """The same VLM, once here and once behind HTTP, which writes its whole answer; the alignment scorer
    thinks first.
    """
    (local,) = loaded_rewards([name], make.OUT)
    assert bool(local.score.reasoning) == (name == "alignment")
    rng = np.random.default_rng(3)
    scenes = [world.sample_scene(rng) for _ in range(6)]
    images = [world.degrade(world.draw(scene), rng)[0] for scene in scenes]
    requests = [model.Request(world.caption(scene)) for scene in scenes]
    with serve(Judge(make.OUT / "rewards" / name)) as server:
        remote = model.Reward(name, 1.0, server.url,
                              model.RemoteScorer("judge", server.url, local.score.rubric,
                                                 local.score.reasoning))
        expected, found = local(images, requests), remote(images, requests)
    assert [why for _, why in expected + found] == [""] * 12
    torch.testing.assert_close(torch.tensor([s for s, _ in found]), torch.tensor([s for s, _ in expected]),
                               rtol=0, atol=1e-4)
    assert np.std([score for score, _ in expected]) > 0.05 and remote.score.mass > 0.9


def test_a_request_shows_sources_first_and_asks_as_the_local_scorer_does(tmp_path):
    for i, level in enumerate((10, 20)):
        grey(level, "RGBA").save(tmp_path / f"{i}.png")
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    request = model.Request("make it {new}", sources=(str(tmp_path / "0.png"), str(tmp_path / "1.png")))
    with serve(lambda number, text, pictures, body: answered(pictures[-1])) as server:
        (reward,) = loaded_rewards([f"consistency={server.url}/"], make.OUT)
        assert [round(score, 3) for score, _ in reward([grey(51), clear], [request, request])] == [1.8, 5]
        model.RemoteScorer("nice", server.url, "Nice?", reasoning=50)([grey(0)], ["x"], [[]])
    shown = {text: [] for text, _ in server.asked}
    for text, pictures in server.asked:
        shown[text].append([picture.getpixel((0, 0))[0] for picture in pictures])
    asked, thinking = shown
    assert sorted(shown[asked]) == [[10, 20, 51], [10, 20, 255]] and shown[thinking] == [[0]]
    assert asked == model.RUBRICS["consistency"].replace("{prompt}", "make it {new}") + model.ANSWERS[False]
    assert thinking == "Nice?" + model.ANSWERS[True]


def spoil(kind, answer):
    """The server's reply where it has a fault."""
    if kind == "out of time":
        time.sleep(1.5)
    if kind == "cut off":
        return choice([("I", {"I": 0.0}), (" see", {" see": 0.0}), (" 4", {" 4": 0.0})], "length")
    return {
        "HTTP 500": (500, b"{}"), "HTTP 429": (429, b"{}"), "HTTP 400": (400, b"{}"), "dropped": HANG_UP,
        "not JSON": (200, b"<html>"), "no choices": (200, b"{}"), "no log-probs": answer | {"logprobs": None},
        "score 7": answered(grey(0), digit="7"), "no mass": answered(grey(0), mass=0.3)}.get(kind, answer)


@pytest.mark.parametrize("kind, tries, reason", [
    ("out of time", 1, "TimeoutError"), ("HTTP 500", 2, "HTTP 500"), ("HTTP 429", 2, "HTTP 429"),
    ("HTTP 400", 1, "HTTP 400"), ("dropped", 2, "RemoteDisconnected"), ("not JSON", 2, "JSONDecodeError"),
    ("no choices", 1, "KeyError"), ("no log-probs", 1, "no log-probs of"),
    ("score 7", 1, "no log-probs of <score>1-5"),
    ("cut off", 1, "finish_reason length"), ("no mass", 1, "only 0.3 of the probability")])
def test_a_faulty_answer_is_a_reason_and_leaves_the_others_alone(monkeypatch, patient, kind, tries, reason):
    monkeypatch.setattr(model.RemoteScorer, "TIMEOUT", 1 if kind == "out of time" else 10)
    images, faulty = [grey(level) for level in range(0, 250, 30)], {30, 120, 210}

    def answer(number, text, pictures, body):
        answer = answered(pictures[0])
        return spoil(kind, answer) if pictures[0].getpixel((0, 0))[0] in faulty else answer

    with serve(answer) as server:
        reward = model.Reward("grey", 1.0, server.url, model.RemoteScorer("nice", server.url, "Nice?"))
        found = reward(images, [model.Request("x")] * len(images))
    for image, (score, why) in zip(images, found):
        if image.getpixel((0, 0))[0] in faulty:
            assert math.isnan(score) and why.startswith("grey: ") and reason in why
        else:
            assert score == pytest.approx(score_of(image), abs=1e-4) and why == ""
    assert len(server.asked) == len(images) + len(faulty) * (tries - 1)


@pytest.mark.parametrize("kind", ["HTTP 500", "dropped", "not JSON", "slow"])
def test_what_is_over_at_the_second_try_or_only_slow_does_no_harm(monkeypatch, patient, kind):
    monkeypatch.setattr(model.RemoteScorer, "TIMEOUT", 10)
    images, tried = [grey(level) for level in (0, 100, 200)], set()

    def answer(number, text, pictures, body):
        level = pictures[0].getpixel((0, 0))[0]
        first = level < 200 and level not in tried
        tried.add(level)
        if kind == "slow" and first:
            time.sleep(0.3)
        return spoil(kind, answered(pictures[0])) if first else answered(pictures[0])

    with serve(answer) as server:
        scores = model.RemoteScorer("nice", server.url, "Nice?")(images, ["x"] * 3, [[]] * 3)
    assert scores == pytest.approx([score_of(image) for image in images], abs=1e-4)
    assert len(server.asked) == (3 if kind == "slow" else 5)


def test_the_last_score_of_an_answer_counts():
    """Also where reasoning speaks of scores, and where tokens carry spaces."""
    one, two = {"2": math.log(0.9), " 2": math.log(0.05), "3": math.log(0.04)}, {"4": math.log(0.5),
                                                                                 "5": math.log(0.5)}
    words = [("<score>", {"<score>": 0.0}), ("2", one), ("</", {"</": 0.0}), ("score>", {"score>": 0.0}),
             (" not", {" not": 0.0})]
    read = lambda tokens: model.score_probabilities(choice(tokens)["logprobs"]["content"])
    more = [("<score>\n", {"<score>\n": 0.0}), ("4", two), ("</score>", {"</score>": 0.0}), ("1", {"1": 0.0})]
    assert read(words) == pytest.approx([0, 0.95, 0.04, 0, 0]) and read(words
                                                                        + more) == pytest.approx([0, 0, 0,
                                                                                                  0.5, 0.5])
    assert read([]) is None and read([("4", two)]) is None


@pytest.mark.parametrize("models", [(200, b"<html>"), (200, b'{"data": []}'), (404, b"{}")])
def test_a_server_that_is_not_there_or_of_another_kind_is_an_error_at_once(patient, models):
    def refused():
        with pytest.raises(model.UserError, match=f"{server.url}/models does not answer"):
            loaded_rewards([f"aesthetic={server.url}"], make.OUT)

    with serve(None, models) as server:
        refused()
    refused()  # now nobody is there


def ask(scorer, count=1):
    return model.Reward("nice", 1.0, "", scorer)([grey(level) for level in range(count)],
                                                 [model.Request("x")] * count)


def test_a_server_that_answers_nothing_is_given_up(monkeypatch, patient, capsys):
    """40 pictures to a server that hangs: a time-out or two, not forty; later it is asked again."""
    monkeypatch.setattr(model.RemoteScorer, "TIMEOUT", 0.5)
    done = threading.Event()

    def answer(number, text, pictures, body):
        done.wait(20)
        return answered(pictures[0])

    with serve(answer) as server:
        scorer, began = model.RemoteScorer("nice", server.url, "Nice?"), time.monotonic()
        found = ask(scorer, 40)
        assert time.monotonic() - began < 3 and len(server.asked) <= 2 * scorer.CONCURRENCY
        assert all("TimeoutError" in why for _, why in found) and "not asked, as" in found[-1][1]
        assert capsys.readouterr().err.count(f"reward nice: {server.url} has not answered for 0.5 s") == 1
        done.set()
        time.sleep(0.6)
        assert [why for _, why in ask(scorer, 3)] == [""] * 3


def test_a_server_that_restarts_is_waited_for(monkeypatch, patient, capsys):
    monkeypatch.setattr(model.RemoteScorer, "AWAY", 20)
    with serve(lambda number, text, pictures, body: answered(pictures[0])) as server:
        scorer, port = model.RemoteScorer("nice", server.url, "Nice?"), server.server_port
    back = threading.Thread(target=lambda: (time.sleep(1), found.append(list(again.__enter__().asked))))
    found, again = [], serve(lambda number, text, pictures, body: answered(pictures[0]), port=port)
    back.start()
    assert [why for _, why in ask(scorer, 3)] == [""] * 3
    back.join()
    again.__exit__(None, None, None)
    assert "is not there (connection refused); waiting up to 20 s for it" in capsys.readouterr().err


def test_no_proxy_stands_before_this_machine(monkeypatch, patient):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serve(lambda number, text, pictures, body: answered(pictures[0])) as server:
        assert ask(model.RemoteScorer("nice", server.url,
                                      "Nice?")) == [(pytest.approx(score_of(grey(0)), abs=1e-4), "")]


def test_one_of_several_models_is_chosen_by_name(patient):
    models = 200, json.dumps({"data": [{"id": "rewards/nice"}, {"id": "judge"}]}).encode()
    with serve(lambda number, text, pictures, body: answered(pictures[0]), models) as server:
        assert model.RemoteScorer("nice", server.url).model == "rewards/nice"
        assert model.RemoteScorer("x", server.url, model="judge").model == "judge"
        for name, wanted in (("beauty", None), ("nice", "other")):
            with pytest.raises(model.UserError,
                               match='serves rewards/nice, judge: say which is reward .* with "model" in a '
                                     'reward file'):
                model.RemoteScorer(name, server.url, model=wanted)


def test_a_served_directory_brings_its_card(tmp_path, patient):
    """What train_reward.py wrote beside the VLM, where the server names a directory that is on this machine.
    """
    (tmp_path / "reward.json").write_text(json.dumps({"rubrics": {"nice": "How nice is {prompt}?"},
                                                      "reasoning": 40}))
    models = 200, json.dumps({"data": [{"id": str(tmp_path)}]}).encode()
    with serve(None, models) as server:
        (reward,) = model.load_rewards([f"x={server.url}"], make.OUT)
    assert reward.score.rubric == "How nice is {prompt}?" and reward.score.reasoning == 40


@pytest.mark.parametrize("path, code, remedy", [
    ("/v1", 401, "OPENAI_API_KEY_NICE or OPENAI_API_KEY"),
    ("", 404, "the address of vLLM and SGLang ends in /v1"), ("/v1", 404, "HTTP 404")])
def test_a_refusal_names_its_remedy(patient, path, code, remedy):
    with serve(None, (code, b'{"error": "no"}')) as server:
        with pytest.raises(model.UserError,
                           match=f"HTTP {code}.*{remedy}" if path != "/v1" or code != 404 else remedy):
            model.RemoteScorer("nice", server.url.removesuffix("/v1") + path)


def test_a_reward_has_its_own_key(monkeypatch, patient):
    monkeypatch.setenv("OPENAI_API_KEY", "all")
    monkeypatch.setenv("OPENAI_API_KEY_NICE", "mine")
    with serve(None) as server:
        assert [model.RemoteScorer(name, server.url).key for name in ("nice", "other")] == ["mine", "all"]


# grpo.py with a remote reward


def run_grpo(folder, url, *arguments, run=run_script):
    """Two steps of grpo.py on four images of two prompts with two remote rewards; its log, or an error with
    its output.
    """
    return run(folder, "--reward", f"aesthetic={url}", f"alignment={url}", "--steps", "2",
               "--prompts-per-step", "2",
               "--group-size", "4", "--updates-per-rollout", "1", "--rollout-batch", "4", "--kl-coef", "0",
               "--eval-images", "0", "--sample-every", "0", "--name", "run", *arguments)


def test_a_run_goes_on_when_few_scores_fail_and_its_rewards_do_not_wait_for_each_other(tmp_path):
    """A tenth of the requests is refused. No aesthetic request is answered before all alignment requests of
    its step came.
    """
    came, scores, held_up = threading.Condition(), {"aesthetic": [], "alignment": []}, []

    def answer(number, text, pictures, body):
        name = "aesthetic" if "visual quality" in text else "alignment"
        with came:
            scores[name].append(score_of(pictures[0]) if number % 10 != 3 else math.nan)
            came.notify_all()
            wanted = 8 * math.ceil(len(scores[name]) / 8)
            if name == "aesthetic" and not came.wait_for(lambda: len(scores["alignment"]) >= wanted, 30):
                held_up.append(number)
        return answered(pictures[0]) if number % 10 != 3 else (400, b"{}")

    with serve(answer) as server:
        log = run_grpo(tmp_path, server.url, "--save-every", "0", "--max-reward-failures", "0.5")
    assert not held_up and len(server.asked) == 32
    assert [line["failed"] for line in log] == [sum(line["reasons"].values()) for line in log] == [2, 1]
    assert all("HTTP 400" in why and why.split(":")[0] in scores for line in log for why in line["reasons"])
    for step, name in product((0, 1), scores):
        assert log[step]["reward"][name] == pytest.approx(np.nanmean(scores[name][8 * step:8 * step + 8]),
                                                          abs=1e-3)
    assert all(line["ratio_dev"] == [0.0] and line["grad_norm"][0] > 0 for line in log)


@pytest.mark.parametrize("step", [0, 1])
def test_a_run_stops_before_the_update_when_scores_fail_and_resumes_when_they_do_not(tmp_path, step):
    """Every score of a step fails, at the default threshold."""
    healthy = []

    def answer(number, text, pictures, body):
        return answered(pictures[0]) if healthy or number < 16 * step else (400, b"{}")

    with serve(answer) as server:
        with pytest.raises(model.UserError) as error:
            run_grpo(tmp_path, server.url, "--save-every", "0")
        for words in (f"before step {step}: 16 of 16 scores failed, --max-reward-failures is 0.05",
                      "8 x alignment: ConnectionError"):
            assert words in str(error.value)
        run = tmp_path / "runs" / "run"
        lines = (run / "log.jsonl").read_text().splitlines() if step else []
        assert len(lines) == step and not (run / "model").exists()
        saved = [path.name for path in (run / "checkpoint").iterdir()] if step else []
        assert saved == [f"step-{step:06d}"] * step  # before the first update there is nothing to save
        healthy.append(True)
        log = run_grpo(tmp_path, server.url, "--save-every", "2", "--resume")
    assert [line["step"] for line in log] == [0, 1] and log[-1]["failed"] == 0 and log[-1]["reasons"] == {}
    assert {state["step"].item() for state in checkpoint(tmp_path)["optimizer"]["state"].values()} == {2}


# Waiting for scores


def test_scores_are_taken_in_the_order_of_the_rollout_whatever_the_order_they_come_in():
    """Three batches of two images by two rewards; groups of three images."""
    rewards = [model.Reward(name, 0.5, "", None) for name in "ab"]
    scores = StepScores(rewards, [model.Request("x")] * 2, 3)
    futures = [[Future(), Future()] for _ in range(3)]
    scores.pending = [(2, pair) for pair in futures]
    rows = [[[(10 * batch + image + 0.5 * k, "") for image in range(2)] for k in range(2)]
            for batch in range(3)]
    everything = [pair for batch in rows for pair in zip(*batch)]

    def finish(*places):
        for batch, k in places:
            futures[batch][k].set_result(rows[batch][k])

    finish((0, 1), (2, 0), (0, 0), (1, 1))
    threading.Timer(0.5, finish, [(1, 0)]).start()
    scores.advantage_of(0)
    # waits for no more than it needs
    assert scores.arrived == everything[:4] and not futures[2][1].done() and scores.seconds > 0.4
    finish((2, 1))
    scores.advantage_of(1)
    assert scores.arrived == everything and scores.pending == []
    expected = torch.tensor([[score for score, _ in pair] for pair in everything]).T.view(2, 2, 3)
    assert torch.equal(scores.scores, expected) and torch.equal(scores.advantage,
                                                                group_advantage(expected, scores.weights))


def test_once_stopped_missing_scores_are_left_out(monkeypatch):
    scores = StepScores([model.Reward("a", 1.0, "", None)], [model.Request("x")], 2)
    scores.pending = [(2, [Future()])]
    monkeypatch.setattr("grpo.STOP", SimpleNamespace(is_set=lambda: True))
    assert scores.advantage_of(0).tolist() == [0, 0] and [why
                                                   for ((_, why),
                                                        ) in scores.arrived] == ["not waited for"] * 2


def test_a_slow_reward_does_not_hold_up_another():
    go, order = threading.Event(), []

    def slow(images, prompts, sources):
        assert go.wait(10)
        order.append("slow")
        return [1.0] * len(images)

    def fast(images, prompts, sources):
        order.append("fast")
        return [2.0] * len(images)

    rewards = [model.Reward(score.__name__, 0.5, "", score) for score in (slow, fast)]
    pools, scores = [ThreadPoolExecutor(1) for _ in rewards], StepScores(rewards, [model.Request("x")], 6)
    for _ in range(3):
        scores.ask(pools, [grey(0)] * 2, [model.Request("x")] * 2)
    futures = [pair for _, pair in scores.pending]
    assert futures[2][1].result(timeout=10) == [(2.0, "")] * 2 and not futures[0][0].done()
    go.set()
    scores.advantage_of(0)
    assert scores.arrived == [((1.0, ""), (2.0, ""))] * 6 and order == ["fast"] * 3 + ["slow"] * 3


# What a reward function may return


@pytest.mark.parametrize("score, expected", [
    (lambda *_: [1, np.float32(2.5), torch.tensor(3.0)], [(1.0, ""), (2.5, ""), (3.0, "")]),
    (lambda *_: np.array([1.0, 2.0, 3.0]), [(1.0, ""), (2.0, ""), (3.0, "")]),
    (lambda *_: (1.0, None, math.nan), [(1.0, ""), (math.inf, ""), (math.nan, "mine: nan")]),
    (lambda *_: [math.inf, -math.inf, 0.0], [(math.nan, "mine: inf"), (math.nan, "mine: -inf"), (0.0, "")]),
    (lambda *_: [ValueError("no"), 2.0, TimeoutError()],
     [(math.nan, "mine: ValueError('no')"), (2.0, ""), (math.nan, "mine: TimeoutError()")]),
    (lambda *_: [1.0, 2.0], [(math.nan, "mine: ValueError('2 scores for 3 images')")] * 3),
    (lambda *_: None, [(math.nan, "mine: TypeError(\"object of type 'NoneType' has no len()\")")] * 3),
    (lambda *_: sys.exit(3), [(math.nan, f"mine: SystemExit(3) at {__file__}:LINE")] * 3),
    (lambda *_: 1 / 0, [(math.nan, f"mine: ZeroDivisionError('division by zero') at {__file__}:LINE")] * 3)])
def test_every_outcome_of_a_reward_is_a_number_or_undefined_or_a_failure_with_its_reason(score, expected):
    found = model.Reward("mine", 1.0, "", score)([grey(0)] * 3, [model.Request("x")] * 3)
    assert [re.sub(r":\d+$", ":LINE", why) for _, why in found] == [why for _, why in expected]
    assert all(type(value) is float for value, _ in found)
    np.testing.assert_array_equal([value for value, _ in found], [value for value, _ in expected])


def test_a_function_may_ask_for_records_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("FACTOR = 2\n")
    (tmp_path / "asks.py").write_text("from neighbour_of_mine import FACTOR\n"
                                      "def score(images, prompts, sources, records):\n"
                                      "    return [FACTOR * record['answer'] for record in "
                                      "records]\nscore.range = 0, 10\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": 1.5}\n{"prompt": "b", "answer": 4}\n')
    (reward,) = model.load_rewards([f"mine={tmp_path / 'asks.py'}:score"], make.OUT)
    found = reward([grey(0)] * 2, model.load_prompts(tmp_path / "p.jsonl"))
    assert found == [(3.0, ""), (8.0, "")] and reward.range == (0, 10)


def test_the_first_error_of_a_function_keeps_its_traceback(capsys):
    reward = model.Reward("mine", 1.0, "", lambda *_: 1 / 0)
    for _ in range(3):
        reward([grey(0)], [model.Request("x")])
    assert capsys.readouterr().err.count("ZeroDivisionError: division by zero") == 1


def test_a_failure_lets_go_of_what_its_frames_held():
    """Such as a judge's activations after it ran out of GPU memory; before any garbage collection."""
    held = []

    def score(images, prompts, sources):
        activations = np.zeros(10)
        held.append(weakref.ref(activations))
        raise MemoryError

    gc.disable()
    try:
        ((value, why),) = model.Reward("mine", 1.0, "", score)([grey(0)], [model.Request("x")])
        assert math.isnan(value) and "MemoryError" in why and held[0]() is None
    finally:
        gc.enable()


def test_weights_of_categories_that_no_prompt_has_are_said(capsys):
    reward = model.Reward("mine", 0.5, "", None, categories={"portrait": 0.5, "potrait": 1.0})
    model.check_rewards([reward], [model.Request("x", "portrait")])
    assert "reward weights for potrait: no prompt is of such a category" in capsys.readouterr().out


@pytest.mark.parametrize("odd", ["much", [4.0], {}, object(), 10**400, 1e300])
def test_an_odd_value_is_a_failure(odd):
    found = model.Reward("mine", 1.0, "", lambda *_: [1.0, odd, 2.0])([grey(0)] * 3, [model.Request("x")] * 3)
    assert torch.tensor([score for score, _ in found])[1].isnan() and found[1][1].startswith("mine: ")


def test_a_missing_source_is_a_failure(tmp_path):
    reward = model.Reward("mine", 1.0, "", lambda images, prompts, sources: [1.0])
    ((score, why),) = reward([grey(0)], [model.Request("x", sources=(str(tmp_path / "gone.png"),))])
    assert math.isnan(score) and why.startswith("mine: UserError") and "gone.png" in why


# Eq. 13


def eq13(scores, weights):
    """group_advantage, by hand."""
    K, P, G = scores.shape
    advantage = np.zeros((P, G))
    for p in range(P):
        defined = [k for k in range(K) if not any(s == math.inf for s in scores[k, p])]
        total = sum(weights[k, p] for k in defined)
        for k in defined:
            good = [s for s in scores[k, p] if not math.isnan(s)]
            if not good or total == 0 or max(good) - min(good) <= 1e-4 * max(map(abs, good)):
                continue
            mean = math.fsum(good) / len(good)
            std = math.sqrt(math.fsum((s - mean) ** 2 for s in good) / len(good))
            for g in range(G):
                if not math.isnan(scores[k, p, g]):
                    advantage[p, g] += weights[k, p] / total * (scores[k, p, g] - mean) / std
    return torch.from_numpy(advantage).float()


def some_scores(seed, K=4, P=12, G=8):
    """Scores with failed and undefined ones and constant groups, and weights that differ per prompt."""
    rng = np.random.default_rng(seed)
    scores = rng.choice(np.linspace(1, 5, 1000), (K, P, G))
    scores = np.where(rng.random((K, P, 1)) < 0.2, 2.5 + 1e-4 * rng.random((K, P, G)), scores)
    scores[rng.random((K, P, G)) < 0.15] = math.nan
    scores[rng.random((K, P)) < 0.1] = math.nan
    scores[-1, rng.random(P) < 0.3] = math.inf
    scores[:, 0], scores[:, 1], scores[:2, 2], scores[2:, 2] = math.nan, math.inf, math.nan, math.inf
    scores[0, 3, 0], scores[-1, 3, 1:] = math.nan, math.inf  # failed where the others are undefined
    return torch.from_numpy(scores).float(), torch.from_numpy(rng.dirichlet(np.ones(K), P).T).float()


@pytest.mark.parametrize("seed", range(5))
def test_advantage_with_failed_and_undefined_scores_constant_groups_and_weights_per_prompt(seed):
    scores, weights = some_scores(seed)
    a = group_advantage(scores, weights)
    torch.testing.assert_close(a, eq13(scores.double().numpy(), weights.double().numpy()), rtol=1e-5,
                               atol=1e-5)
    assert a.isfinite().all() and (a[:3] == 0).all() and a[4:].abs().max() > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_scale_and_offset_of_a_reward_change_nothing(seed):
    scores, weights = some_scores(seed)
    a = group_advantage(scores, weights)
    for k in range(len(scores)):
        scaled, moved = scores.clone(), scores.clone()
        scaled[k], moved[k] = 1000 * scores[k], scores[k] + 7
        torch.testing.assert_close(group_advantage(scaled, weights), a, rtol=0, atol=1e-5)
        torch.testing.assert_close(group_advantage(moved, weights), a, rtol=0, atol=1e-5)


def test_an_undefined_reward_passes_its_weight_on_and_a_failed_one_does_not():
    scores, weights = torch.rand(2, 1, 6) + 1, torch.tensor([[0.3], [0.7]])
    alone = group_advantage(scores[:1], torch.ones(1, 1))
    scores[1] = math.inf
    torch.testing.assert_close(group_advantage(scores, weights), alone)
    scores[1] = math.nan
    torch.testing.assert_close(group_advantage(scores, weights), 0.3 * alone)
    weights[0] = 0  # nothing is left
    scores[1] = math.inf
    assert (group_advantage(scores, weights) == 0).all()


# Identity


def face(eyes, mood="smiling", x=32, y=32, r=24, background="white", color="yellow"):
    return world.draw(world.Scene("face", (world.Item("face", color, x, y, r),), background, mood=mood,
                                  eyes=eyes))


def test_identity_is_the_best_cosine_per_source_face():
    """A picture is a list of embeddings here."""
    identity = model.face_identity(lambda picture: picture)
    similarity = lambda image, sources: identity([image], [""], [sources])[0]
    a, b, c = [3.0, 0.0, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 0.0]
    assert similarity([a], []) is None and similarity([a], [[], []]) is None
    assert similarity([], [[a]]) == 0 and similarity([[-1.0, 0.0, 0.0]], [[a]]) == 0
    assert similarity([a], [[a]]) == pytest.approx(1) and similarity([c], [[a]]) == pytest.approx(0.5**0.5)
    assert similarity([[0.0, 0.0, 0.0]], [[a]]) == 0
    # one of two is gone: clamped before the mean
    assert similarity([a], [[a], [[-9.0, 0.0, 0.0]]]) == pytest.approx(0.5)
    for old, new in product(permutations([a, b, c]), permutations([b, c])):
        assert similarity(new, [old[:1], old[1:]]) == pytest.approx((0.5**0.5 + 1 + 1) / 3)


def test_identity_tells_faces_of_the_tiny_world_apart():
    identity = model.face_identity(world.embed_faces)
    nobody = world.draw(world.Scene("single", (world.Item("circle", "red", 32, 32, 16),), "white"))
    assert identity([face("red"), nobody], ["", ""], [[nobody], [face("red")]]) == [None, 0.0]
    rng = random.Random(0)
    for eyes, color in product(world.EYES["yellow"], world.EYES):
        for other, mood, background in product(world.EYES[color], world.MOODS, world.BACKGROUNDS):
            moved = face(other, mood, rng.uniform(28, 36), rng.uniform(28, 36), rng.uniform(21, 27),
                         background, color).convert("RGBA")
            (score,) = identity([moved], [""], [[face(eyes)]])
            assert score > 0.9 if eyes == other else score < 0.5


def test_identity_without_insightface_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(model.UserError, match="pip install insightface onnxruntime.*identity=file.py:embed"):
        loaded_rewards(["identity"], make.OUT)
    (reward,) = loaded_rewards([f"identity={WORLD}:embed_faces"], make.OUT)
    assert reward.score([face("red")], [""], [[face("red")]]) == [pytest.approx(1)]


# Reward files


def load(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return loaded_rewards([str(path)], make.OUT)


def test_a_reward_file_gives_weights_per_category_ranges_and_sources_beside_it(tmp_path):
    (tmp_path / "mine.py").write_text("def one(images, prompts, sources):\n    return [1.0] * len(images)\n")
    with serve(lambda number, text, pictures, body: answered(pictures[0])) as server:
        one, far, faces = load(tmp_path / "rewards.json", {
            "rewards": {"one": {"weight": 0.5, "source": "mine.py:one", "range": [0, 1]},
                        "far": {"weight": 0.5, "source": server.url, "rubric": "Grey {prompt}?",
                                "reasoning": 9},
                        "identity": {"weight": 0, "source": f"{WORLD}:embed_faces"}},
            "categories": {"portrait": {"one": 0.1, "far": 0.2, "identity": 0.7}, "typography": {"far": 1}}})
        assert far([grey(51)], [model.Request("x")]) == [(pytest.approx(1.8), "")]
    assert server.asked[0][0] == "Grey x?" + model.ANSWERS[True]
    assert one([grey(0)] * 2, [model.Request("x")] * 2) == [(1.0, ""), (1.0, "")]
    assert [reward.name for reward in (one, far, faces)] == ["one", "far", "identity"]
    assert one.range == (0, 1) and far.range == (1, 5)
    weights = {"general": [0.5, 0.5, 0], "portrait": [0.1, 0.2, 0.7], "typography": [0, 1, 0]}
    for category, expected in weights.items():
        assert [reward.categories.get(category, reward.weight) for reward in (one, far, faces)] == expected


SOURCE = {"source": f"{WORLD}:aesthetic_reward"}
ONE = {"a": SOURCE | {"weight": 1}}


@pytest.mark.parametrize("table, message", [
    ({"rewards": {"a": SOURCE | {"weight": 0.5}, "b": SOURCE | {"weight": 0.4}}},
     "rewards.json: rewards: the weights sum to 0.9, not to 1"),
    ({"rewards": {"a": SOURCE | {"weight": 1.5}, "b": SOURCE | {"weight": -0.5}}},
     "rewards: the weight of a is 1.5, want a number from 0"),
    ({"rewards": {"a": SOURCE | {"weight": True}}}, "rewards: the weight of a is True, want a number"),
    ({"rewards": {"a": SOURCE | {"weight": math.nan}}}, "rewards: the weight of a is nan, want a number"),
    ({"rewards": ONE, "categories": {"portrait": {"a": 0.5}}},
     "rewards.json: portrait: the weights sum to 0.5"),
    ({"rewards": ONE, "categories": {"portrait": {"b": 1}}}, "rewards.json: portrait: there is no reward b"),
    ({"rewards": {"a": ONE["a"] | {"rang": [0, 1]}}}, "rewards.json: reward a: unknown key rang"),
    ({"rewards": {"beauty": {"weight": 1}}}, "beauty: no such rubric"),
    ({"rewards": {"a": 1}}, "rewards.json: want "), ({"rewards": [1]}, "rewards.json: want "),
    ({"rewards": {"a": ONE["a"] | {"weight": "1"}}}, "rewards.json: rewards: the weight of a is '1'"),
    ({"rewards": ONE, "categories": [1]}, "rewards.json: want "),
    ({"rewards": {"a": ONE["a"] | {"range": 5}}}, "rewards.json: the range of a is 5, want two numbers"),
    ({"rewards": {"a": ONE["a"] | {"range": [5, 1]}}}, r"rewards.json: the range of a is \[5, 1\]"),
    ({"rewards": {"a": ONE["a"] | {"range": [1, 2, 5]}}}, "rewards.json: the range of a is"),
    ({"rewards": {"a": ONE["a"] | {"reasoning": "yes"}}},
     'reward a: "reasoning" is \'yes\', want a number of tokens'),
    ({"rewards": {"a": {"weight": 1, "source": 5}}}, 'reward a: "source" is 5, want a string'),
    ({"rewards": {"a": {"weight": 1, "source": "mine.py"}}}, "want file.py:function"),
    ({}, "rewards.json: want "), ("{", "rewards.json: not JSON"), ("[]", "not a JSON object"),
    ({"rewards": ONE, "category": {"portrait": {"a": 1}}}, "rewards.json: unknown key category"),
    ({"rewards": ONE | {"b": SOURCE}}, "rewards.json: rewards: the weight of b is None")])
def test_a_wrong_reward_file_is_a_clear_error(tmp_path, table, message):
    with pytest.raises(model.UserError, match=message):
        load(tmp_path / "rewards.json", table)


@pytest.mark.parametrize("specs",
                         [["a={0}", "a={0}"], ["a={0}", "rewards.json"],
                          ["rewards.json", "rewards_edit.json"],
                                   ["rewards.json", "a={0}"]])
def test_names_differ_and_a_reward_file_stands_alone(specs):
    specs = [str(ROOT / "tests/tiny" / spec) if spec.endswith(".json") else spec.format(SOURCE["source"])
             for spec in specs]
    with pytest.raises(model.UserError, match="want different names, or one JSON file alone"):
        loaded_rewards(specs, make.OUT)


@pytest.mark.skipif(not all((make.OUT / "rewards" / name).is_dir()
                            for name in ("portrait", "instruction", "consistency")),
                    reason="these scorers are not made yet")
@pytest.mark.parametrize("file", ["rewards.json", "rewards_edit.json"])
def test_the_tiny_worlds_reward_files_load(file):
    rewards = loaded_rewards([str(ROOT / "tests/tiny" / file)], make.OUT)
    assert len(rewards) == 3 and not any("zero-shot" in reward.source for reward in rewards)
    for reward in rewards:
        assert reward.name == "identity" or reward.score.rubric == model.RUBRICS[reward.name]
