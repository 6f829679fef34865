"""The tiny world: its oracle reads back what was drawn, and its aesthetic cannot be had by drawing little."""

from collections import Counter
from pathlib import Path

import make
import numpy as np
import pytest

import world

TINY = Path(__file__).resolve().parent / "tiny"


@pytest.mark.parametrize("kind", world.KINDS)
def test_oracle_reads_back_clean_pictures(kind):
    rng = np.random.default_rng(5)
    scenes = [world.sample_scene(rng, kind) for _ in range(40)]
    assert all(world.alignment(world.draw(scene), world.caption(scene)) == (True, 1.0) for scene in scenes)
    others = [world.caption(world.sample_scene(rng, kind)) for _ in scenes]
    wrong = [world.alignment(world.draw(s), o)[0] for s, o in zip(scenes, others) if o != world.caption(s)]
    assert np.mean(wrong) < 0.1


def test_every_caption_parses():
    assert len(world.all_captions()) > 2000
    with pytest.raises(ValueError):
        world.parse("a photo of a cat")


def test_aesthetic_falls_with_degradation_and_not_with_size():
    rng = np.random.default_rng(6)
    scenes = [world.sample_scene(rng) for _ in range(60)]
    clean = [world.aesthetic(world.draw(scene)) for scene in scenes]
    spoiled, severity = zip(*(world.degrade(world.draw(scene), rng) for scene in scenes))
    assert min(clean) > 0.9 and np.mean([world.aesthetic(image) for image in spoiled]) < 0.6
    assert np.corrcoef([world.aesthetic(image) for image in spoiled], severity)[0, 1] < -0.5
    assert world.aesthetic(world.Image.new("RGB", (64, 64), "white")) == 0
    blurred = {}
    for radius in (8, 22):
        item = world.Item("circle", "red", 32, 32, radius)
        image = world.draw(world.Scene("single", (item,), "white"))
        blurred[radius] = world.aesthetic(image.filter(world.ImageFilter.GaussianBlur(0.8)))
    assert abs(blurred[8] - blurred[22]) < 0.05


def test_edits_keep_what_they_do_not_touch():
    rng = np.random.default_rng(7)
    for _ in range(40):
        source, instruction, target = world.sample_edit(rng)
        before, after = world.draw(source), world.draw(target)
        assert world.alignment(after, world.caption(target))[0]
        assert not world.alignment(before, world.caption(target))[0]
        assert world.consistency(before, after, source, target) == pytest.approx(1)


def test_a_wrong_object_caps_the_score():
    """The hierarchy of Sec. 3.1: an object first, then its attributes, then relations, whatever the sizes."""
    rng, prompt = np.random.default_rng(8), "a red circle above a blue square on a white background"

    def score(upper, lower, background="white"):
        items = [world.Item(form, color, 32, y, rng.uniform(8, 10.5)) for (color, form), y in
                 ((upper, 17), (lower, 47))]
        image = world.draw(world.Scene("relation", tuple(items), background))
        return world.alignment_reward([image], [prompt])

    red, blue = ("red", "circle"), ("blue", "square")
    for _ in range(20):
        assert score(red, blue) == [5]
        for wrong in (score(red, ("blue", "triangle")), score(("red", "square"), blue)):
            assert 1 < wrong[0] <= 2
        for flawed in (score(blue, red), score(red, ("green", "square")), score(red, blue, "black")):
            assert 3 < flawed[0] < 5
    one = world.draw(world.Scene("single", (world.Item("circle", "red", 32, 32, 15),), "white"))
    assert world.alignment_reward([one], [prompt])[0] <= 2


def test_an_edit_that_misses_its_core_is_capped():
    rng = np.random.default_rng(9)
    for _ in range(60):
        source, instruction, target = world.sample_edit(rng)
        before = world.draw(source)
        rewards = [world.instruction_reward([world.draw(scene)], [instruction], [[before]])[0]
                   for scene in (target, source)]
        assert rewards[0] == 5 and rewards[1] <= 2


def test_what_a_scorer_says_of_an_edit():
    circle, square = world.Item("circle", "red", 20, 32, 10), world.Item("square", "blue", 46, 32, 10)
    source = world.draw(world.Scene("relation", (circle, square), "black", "left of"))
    unseen = world.draw(world.Scene("single", (square,), "white"))  # of which it says nothing
    said = make.reasoning("make the red circle green", unseen, source)
    was = "a red circle left of a blue square on a black background"
    assert said == f"{was}; asked {was.replace('red', 'green')}"


def test_the_naive_scorer_likes_small_objects_and_the_aesthetic_does_not():
    def soft(r):
        image = world.draw(world.Scene("single", (world.Item("circle", "red", 32, 32, r),), "white"))
        return image.filter(world.ImageFilter.GaussianBlur(0.8))

    assert world.palette(soft(6)) > world.palette(soft(20)) + 0.1
    assert abs(world.aesthetic(soft(6)) - world.aesthetic(soft(20))) < 0.06


def test_a_disfigured_face_is_a_worse_portrait():
    rng = np.random.default_rng(10)
    scenes = [world.sample_scene(rng, "face") for _ in range(80)]
    good = [world.portrait(world.draw(scene)) for scene in scenes]
    bad = [world.portrait(world.disfigure(scene, rng)) for scene in scenes]
    assert min(good) > 0.9 and max(bad) < 0.8 and np.std(bad) > 0.1


def test_noise_scores_nowhere():
    rng = np.random.default_rng(12)
    for kind in world.KINDS:
        for _ in range(12):
            values = rng.integers(0, 256, (64, 64, 3))
            values = values if rng.random() < 0.5 else (values[..., :1] > 127).repeat(3, axis=2) * 255
            noise = world.Image.fromarray(values.astype(np.uint8))
            source, instruction, target = world.sample_edit(rng, kind)
            assert world.aesthetic(noise) == 0 == world.portrait(noise)
            assert world.alignment_reward([noise], [world.caption(target)])[0] <= 2
            edit = [noise], [instruction], [[world.draw(source)]]
            assert world.instruction_reward(*edit)[0] <= 2 and world.consistency_reward(*edit)[0] < 3


def test_a_face_that_is_not_whole_is_no_circle():
    rng = np.random.default_rng(13)
    for scene in (world.sample_scene(rng, "face") for _ in range(60)):
        circle = f"{world._article(scene.items[0].color)} circle on a {scene.background} background"
        assert world.alignment_reward([world.disfigure(scene, rng)], [circle])[0] <= 2


def lines(name):
    return make.read_lines(TINY / name)


def test_held_out_prompts_are_many_and_not_trained_on():
    """In other words neither: what is above another is the other below it."""
    meaning = lambda name: {world.canonical(world.parse(record["prompt"])) for record in lines(name)}
    assert len(meaning("heldout.jsonl")) == len(lines("heldout.jsonl")) >= 300
    assert not meaning("heldout.jsonl") & meaning("prompts.jsonl")
    assert min(Counter(record["category"] for record in lines("heldout.jsonl")).values()) >= 24
    for record in lines("heldout.jsonl") + lines("prompts.jsonl"):
        assert world.category(record["prompt"]) == record["category"]


def test_held_out_edits_are_many_and_not_trained_on():
    meaning = lambda name: {(world.canonical(world.parse(r["before"])), r["prompt"]) for r in lines(name)}
    assert not meaning("edits_heldout.jsonl") & meaning("edits.jsonl")
    kinds = Counter(world.edit_kind(record["prompt"]) for record in lines("edits_heldout.jsonl"))
    assert set(kinds) == set(world.EDIT_KINDS) and min(kinds.values()) >= 24
    for record in lines("edits_heldout.jsonl") + lines("edits.jsonl"):
        source = world.Image.open(TINY / record["source"])
        assert world.alignment(source, record["before"])[0]
        after = world.canonical(world.edited(world.read(source), record["prompt"]))
        assert world.parse(world.caption(after)) == world.canonical(world.parse(record["after"]))


def test_pairs_are_of_the_pictures_and_by_the_scores_of_the_points():
    rng = np.random.default_rng(11)
    points = [{"prompt": f"p{i % 5}", "image": f"{i}.png", "score": int(rng.integers(1, 6))}
              for i in range(40)]
    pairs, of = make.pairs(rng, points), {record["image"]: record for record in points}
    assert len(pairs) > 40
    for pair in pairs:
        better, worse = of[pair["chosen"]], of[pair["rejected"]]
        assert better["score"] > worse["score"] and better["prompt"] == worse["prompt"] == pair["prompt"]
