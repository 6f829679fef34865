"""The tiny world: its oracle reads back what was drawn, and its aesthetic cannot be had by drawing little."""

import json
from pathlib import Path

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


def test_held_out_prompts_are_not_trained_on():
    read = lambda name: [json.loads(line)["prompt"] for line in (TINY / name).read_text().splitlines()]
    assert not set(read("heldout.jsonl")) & set(read("prompts.jsonl"))
