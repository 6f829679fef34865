"""Face embeddings for the `identity` reward by dlib, whose weights are in the public domain.

    pip install dlib-bin face-recognition-models
    python nft.py --reward identity=tests/rewards/faces.py:embed --prompts edits.jsonl ...

dlib's vectors are not centred: the cosine of two people is about .8, of two pictures of one above .9. Within
a group that is only a scale, which Eq. 4 takes out. ArcFace's (insightface) is near 0 for two people. A false
face that the detector sees in a source counts like a person who has to be preserved, and is averaged with the
others: a photograph of one person in which dlib sees a second face scores .89 against itself blurred, where
the person alone would score .94 (a slow test).
"""

from importlib.util import find_spec
from pathlib import Path

import dlib
import numpy as np

WEIGHTS = Path(find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
detect = dlib.get_frontal_face_detector()
landmarks = dlib.shape_predictor(str(WEIGHTS / "shape_predictor_5_face_landmarks.dat"))
network = dlib.face_recognition_model_v1(str(WEIGHTS / "dlib_face_recognition_resnet_model_v1.dat"))


def embed(image):
    """One vector (128,) per face."""
    pixels = np.array(image.convert("RGB"))
    return [np.array(network.compute_face_descriptor(pixels, landmarks(pixels, box)))
            for box in detect(pixels, 1)]
