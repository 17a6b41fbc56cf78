"""Prompts, images and masks for the tests of the pipeline."""

import numpy as np
from PIL import Image

PROMPT = "a red apple"


def options(**changes: object) -> dict:
    return {"seed": 1, "num_inference_steps": 4, "guidance_scale": 3.0, "progress": False} | changes


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(array(a) - array(b)).max())
