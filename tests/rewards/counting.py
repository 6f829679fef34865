"""A reward with ground truth from the prompt file: are there as many of the object as were asked for?

    {"prompt": "three cats on a sofa", "object": "cat", "count": 3}

    python grpo.py --reward counting=tests/rewards/counting.py:score --prompts counts.jsonl ...

1 where the detector finds as many, 1/2 where it is off by one, and so on. A reading (OCR) or a yes-or-no
reward has the same form.
"""

import os

import torch
from transformers import OwlViTForObjectDetection, OwlViTProcessor

DETECTOR = os.environ.get("DETECTOR", "google/owlvit-base-patch32")
THRESHOLD = 0.2
processor = OwlViTProcessor.from_pretrained(DETECTOR)
detector = OwlViTForObjectDetection.from_pretrained(DETECTOR).eval()


@torch.no_grad()
def count(image, name):
    inputs = processor(text=[[f"a photo of a {name}"]], images=image.convert("RGB"), return_tensors="pt")
    found = processor.post_process_grounded_object_detection(detector(**inputs), threshold=THRESHOLD)
    return len(found[0]["scores"])


def score(images, prompts, sources, records):
    """records are the lines of the prompt file; one that names no object has no score of this kind."""
    return [1 / (1 + abs(count(image, record["object"]) - record["count"])) if "object" in record else None
            for image, record in zip(images, records)]


score.range = 0, 1
