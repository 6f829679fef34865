"""A reward that learned what people prefer: PickScore, or any other model of CLIP's architecture.

    python grpo.py --reward preference=tests/rewards/preference.py:score

The cosine between image and prompt, times 100; PickScore's lie near 20.
"""

import os

import torch
from transformers import AutoProcessor, CLIPModel

SCORER = os.environ.get("SCORER", "yuvalkirstain/PickScore_v1")
processor, clip = AutoProcessor.from_pretrained(SCORER), CLIPModel.from_pretrained(SCORER).eval()


@torch.no_grad()
def score(images, prompts, sources):
    inputs = processor(text=prompts, images=[image.convert("RGB") for image in images], padding=True,
                       truncation=True, return_tensors="pt")
    answer = clip(**inputs)
    return (100 * torch.cosine_similarity(answer.image_embeds, answer.text_embeds)).tolist()


score.range = 15, 25
