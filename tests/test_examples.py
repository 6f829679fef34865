"""The reward functions that the README offers for copying, on small stand-ins of the models that they load.
"""

import importlib.util
import json
import sys

import model
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from runs import ROOT

EXAMPLES = ROOT / "tests" / "rewards"
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def save_clip(directory, kind, config, images, processor):
    """A model of CLIP's architecture with random weights, whose tokenizer spells."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = SIZE | {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    processor(images, tokenizer).save_pretrained(directory)
    kind(config(text_config=text, vision_config=SIZE | {"image_size": 32, "patch_size": 8},
                projection_dim=32)).save_pretrained(directory)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 4), dtype=np.uint8)) for _ in range(3)]


def test_a_preference_model_is_a_reward(tmp_path, monkeypatch, images):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    save_clip(tmp_path, CLIPModel, CLIPConfig, pixels, CLIPProcessor)
    monkeypatch.setenv("SCORER", str(tmp_path))
    (reward,) = model.load_rewards([f"preference={EXAMPLES / 'preference.py'}:score"], tmp_path)
    requests = [model.Request(prompt) for prompt in ("a red circle", "a blue square", "a red circle")]
    (first, _), (second, _), (third, _) = reward(images, requests)
    clip = sys.modules["preference"].clip
    inputs = sys.modules["preference"].processor(text=["a red circle"], images=[images[0].convert("RGB")],
                                                 return_tensors="pt")
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image.item() / clip.logit_scale.exp().item() * 100
    assert first == pytest.approx(expected,
                                  abs=1e-3) and len({first, second, third}) == 3 and reward.range == (15, 25)


def test_a_counting_reward_takes_its_answer_from_the_prompt_file(tmp_path, monkeypatch, images):
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    save_clip(tmp_path, OwlViTForObjectDetection, OwlViTConfig,
              OwlViTImageProcessor(size={"height": 32, "width": 32}), OwlViTProcessor)
    monkeypatch.setenv("DETECTOR", str(tmp_path))
    (tmp_path / "counts.jsonl").write_text("\n".join(map(json.dumps, [
        {"prompt": "two cats", "object": "cat", "count": 2},
        {"prompt": "a cat", "object": "cat", "count": 16}, {"prompt": "a sky"}])))
    (reward,) = model.load_rewards([f"counting={EXAMPLES / 'counting.py'}:score"], tmp_path)
    counting = sys.modules["counting"]
    monkeypatch.setattr(counting, "THRESHOLD", 0.0)  # all 16 patches are found
    assert reward(images, model.load_prompts(tmp_path / "counts.jsonl")) == [(pytest.approx(1 / 15), ""),
                                                                             (1.0, ""), (model.UNDEFINED, "")]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("dlib", "face_recognition_models", "skimage"))),
                    reason="pip install dlib-bin face-recognition-models scikit-image")
def test_a_face_embedder_tells_people_apart(tmp_path):
    """On a photograph of scikit-image, and on its 25-pixel portraits of others; the detector sees a second
    face in the photograph.
    """
    from skimage import data

    photograph = Image.fromarray(data.astronaut())
    photograph.save(tmp_path / "source.png")
    request = model.Request("make it grey", sources=(str(tmp_path / "source.png"),))
    (identity,) = model.load_rewards([f"identity={EXAMPLES / 'faces.py'}:embed"], tmp_path)
    embed = sys.modules["faces"].embed
    others = [Image.fromarray((255 * face).astype(np.uint8)).convert("RGB").resize((200, 200))
              for face in data.lfw_subset()[:4]]
    edits = [photograph, ImageOps.mirror(photograph), photograph.convert("L"),
             photograph.filter(ImageFilter.GaussianBlur(3)), others[0],
             Image.new("RGB", (512, 512))]
    same, mirrored, grey, blurred, other, nobody = (score
                                                    for score,
                                                    _ in identity([edit.convert("RGBA") for edit in edits],
                                                                  [request] * 6))
    print({"same": same, "mirrored": mirrored, "grey": grey, "blurred": blurred, "another": other,
           "nobody": nobody})
    alone = torch.cosine_similarity(*(torch.tensor(embed(picture)[0]) for picture in (photograph, edits[3])),
                                    dim=0)
    print({"blurred, the person alone": alone.item()})
    assert alone == pytest.approx(0.94, abs=0.02) and blurred == pytest.approx(0.89, abs=0.02)
    assert same == pytest.approx(1) and nobody == 0 and len(embed(photograph)) == 2
    assert min(mirrored, grey) > blurred > 0.85 > other > 0.7
