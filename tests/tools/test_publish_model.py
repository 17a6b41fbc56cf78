"""tools/publish_model.py: what it writes, and what it refuses."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.captioned_images import open_images
from latentdiff.pipeline import LatentDiffusionPipeline
from tools.publish_model import publish

pytestmark = pytest.mark.runs
PROMPTS = ["noto style, apple", "fluent flat style, cat"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, unet_run: Path) -> Path:
    out = tmp_path_factory.mktemp("published") / "model"
    written = publish(unet_run, out, PROMPTS, progress=False)
    assert written["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return out


def test_weights_are_halved(published, unet_run):
    files = sorted(published.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        own, full = load_file(file), load_file(unet_run / file.relative_to(published))
        assert own.keys() == full.keys()
        for key, weights in own.items():
            assert weights.dtype == torch.float16
            if "token_embedding" not in key:
                torch.testing.assert_close(weights, full[key].half(), rtol=0, atol=0)


def test_tokens_without_training_are_zero(published, unet_run):
    """Exactly those that no caption has. So trained prompts have the same context, up to float16."""
    config = load_config(UNetTrainingConfig, unet_run / "config.yaml")
    own, full = (LatentDiffusionPipeline.from_pretrained(folder) for folder in (published, unet_run))
    images, _ = open_images(config.data, 3, config.train.seed, progress=False)
    vectors = own.text_encoder.token_vectors
    assert set(vectors.any(dim=1).nonzero().flatten().tolist()) <= set(own.tokenizer(images.captions).unique().tolist())
    assert vectors.any(dim=1).sum() > 20
    with torch.no_grad():
        contexts = [one.text_encoder(one.tokenizer(images.captions[:4])) for one in (own, full)]
    torch.testing.assert_close(*contexts, rtol=0, atol=5e-3)


def test_samples_show_every_prompt(published):
    with Image.open(published / "samples.png") as image:
        assert image.width > 6 * 96 and image.height > 96


def test_nothing_is_overwritten(published, unet_run, tmp_path):
    with pytest.raises(ValueError, match="exists, delete it first"):
        publish(unet_run, published, PROMPTS, progress=False)
    with pytest.raises(ValueError, match="no prompts"):
        publish(unet_run, tmp_path / "new", [], progress=False)


def test_infinite_weights_are_refused(unet_run, tmp_path):
    pipeline = LatentDiffusionPipeline.from_pretrained(unet_run)
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = 1e5
    pipeline.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes((unet_run / "config.yaml").read_bytes())
    with pytest.raises(
        ValueError, match=r"the UNet to save \(torch.float16\) has values that are not finite, in conv_out.weight"
    ):
        publish(tmp_path / "run", tmp_path / "out", PROMPTS, progress=False)
    assert not (tmp_path / "out").exists()
