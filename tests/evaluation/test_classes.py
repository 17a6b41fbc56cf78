"""The classifier of class-conditional images, and its measures against computations by hand."""

import json

import numpy as np
import pytest
import torch
from image_sets import blobs, coloured, coloured_arrays, image_set
from safetensors.torch import save_file
from tiny import normal, tiny_pipeline
from torch import Tensor

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.classes import (
    Classifier,
    class_fidelity,
    classes_of,
    classify,
    kernel_inception_distance,
    of_classes,
    train_classifier,
)
from latentdiff.images import to_bytes, to_pixels


def pixels_of(images: CaptionedImages) -> Tensor:
    return torch.stack([images.pixels(i) for i in range(len(images))])


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Two colours, learned in a few steps."""
    return train_classifier(coloured(), seed=0, steps=15, batch_size=12, progress=False)


# --- the classifier ---


def test_classifier_distinguishes_two_colours(classifier):
    assert classifier.classes == ("green", "red")
    held_out = coloured(per_class=20, seed=1)
    _, guesses = classify(classifier, to_bytes(pixels_of(held_out)))
    assert [classifier.classes[guess] for guess in guesses] == held_out.captions
    # What it has learned is not in its random weights.
    untrained = Classifier.from_seed(classifier.classes, 3, 16, torch.Generator().manual_seed(0))
    _, guesses = classify(untrained, to_bytes(pixels_of(held_out)))
    assert [classifier.classes[guess] for guess in guesses] != held_out.captions


def test_same_seed_same_weights_and_no_global_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = train_classifier(coloured(), seed=3, steps=3, batch_size=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = train_classifier(coloured(), seed=3, steps=3, batch_size=5, progress=False)
    other = train_classifier(coloured(), seed=4, steps=3, batch_size=5, progress=False)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 17, 28, 64])
def test_shapes(channels, size):
    model = Classifier.from_seed(("a", "b", "c"), channels, size, torch.Generator().manual_seed(0))
    pixels = normal(2, channels, size, size).clamp(-1, 1)
    features = model.features(pixels)
    assert features.shape == (2, 128) and features.min() >= 0 and features.max() > 0
    logits = model(pixels)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)
    # An image's logits are its own, and the same in both modes.
    torch.testing.assert_close(model.eval()(pixels[:1]), logits[:1], atol=1e-5, rtol=1e-5)


def test_classify_is_the_classifier_on_pixels(classifier):
    pixels = pixels_of(coloured(per_class=3))
    features, guesses = classify(classifier, to_bytes(pixels))
    with torch.no_grad():
        torch.testing.assert_close(features, classifier.features(pixels).double(), atol=1e-5, rtol=1e-5)
        assert guesses.tolist() == classifier(pixels).argmax(1).tolist()
    assert features.dtype == torch.float64


def test_classifier_sees_images_as_the_model_does():
    """With a flip of 1 a model generates mirror images, and these are what the classifier must know."""
    arrays, names = coloured_arrays(["red", "green"], 6, seed=2)
    mirrored = image_set([np.ascontiguousarray(array[:, ::-1]) for array in arrays], names)
    flipped = train_classifier(image_set(arrays, names, flip=1.0), seed=3, steps=3, batch_size=5, progress=False)
    expected = train_classifier(mirrored, seed=3, steps=3, batch_size=5, progress=False)
    plain = train_classifier(image_set(arrays, names), seed=3, steps=3, batch_size=5, progress=False)
    assert torch.equal(flipped.head.weight, expected.head.weight)
    assert not torch.equal(flipped.head.weight, plain.head.weight)


def test_save_and_load(classifier, tmp_path):
    path = tmp_path / "folder" / "classifier.safetensors"
    classifier.save(path)
    loaded = Classifier.load(path)
    assert (loaded.classes, loaded.channels, loaded.size) == (("green", "red"), 3, 16)
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    pixels = pixels_of(coloured())
    assert torch.equal(loaded(pixels), classifier(pixels))
    loaded.check(coloured(), "it")
    with pytest.raises(
        ValueError, match=r"^it knows 2 classes, the images have 2; only in one of the two: blue, green$"
    ):
        loaded.check(coloured(("red", "blue")), "it")
    with pytest.raises(ValueError, match=r"^it takes 3 channel\(s\) of 16 px, the images have 1 of 16 px$"):
        loaded.check(coloured(channels=1), "it")
    with pytest.raises(ValueError, match=r"the images have 3 of 32 px$"):
        loaded.check(coloured(size=32), "it")


def test_load_refuses(classifier, tmp_path):
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(ValueError, match=r"does not exist"):
        Classifier.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"is truncated or not a safetensors file"):
        Classifier.load(path)
    for metadata in (None, {"classifier": "{}"}, {"classifier": "3"}, {"classifier": "{"}):
        save_file(dict(classifier.state_dict()), path, metadata)
        with pytest.raises(ValueError, match=r"is not a classifier: its header has no classes, channels and size$"):
            Classifier.load(path)
    about = json.dumps({"classes": ["a", "b", "c"], "channels": 3, "size": 16})
    save_file(dict(classifier.state_dict()), path, {"classifier": about})
    with pytest.raises(
        ValueError, match=r"does not fit the model: head.weight is \[2, 128\], the config says \[3, 128\]"
    ):
        Classifier.load(path)
    weights = {name: value for name, value in classifier.state_dict().items() if name != "head.bias"}
    save_file(weights, path, {"classifier": about})
    with pytest.raises(ValueError, match=r"missing head.bias"):
        Classifier.load(path)


# --- the classes ---


def test_classes():
    assert classes_of(coloured(("red", "blue", "green"), per_class=2)) == ("blue", "green", "red")
    with pytest.raises(ValueError, match=r"^'memory' has no captions, but its classes are its captions$"):
        classes_of(blobs(4))
    with pytest.raises(ValueError, match=r"'memory' has 1 different caption\(s\), must have 2 .. 1000"):
        train_classifier(coloured(("red",)), progress=False)
    with pytest.raises(ValueError, match=r"'memory' has 1001 different caption\(s\)"):
        classes_of(coloured([f"image {i}" for i in range(1001)], per_class=1))
    with pytest.raises(ValueError, match=r"has an empty caption, which cannot be a class"):
        classes_of(coloured(("", "red")))
    with pytest.raises(ValueError, match=r"at least 16 pixels, these have 8$"):
        train_classifier(coloured(size=8), progress=False)


def test_held_out_images_of_the_classes():
    images = coloured(("red", "blue", "green"), per_class=2)
    kept = of_classes(images, ("green", "red"))
    assert kept.captions == ["red", "green", "red", "green"]
    assert torch.equal(kept.pixels(1), images.pixels(2))
    with pytest.raises(ValueError, match=r"^0 of 6 held-out images are of the 2 classes, must be at least 2$"):
        of_classes(images, ("yellow", "pink"))
    none = CaptionedImages(images.table.select([]), images.config, images.channels, images.seed)
    with pytest.raises(ValueError, match=r"must be at least 2; set data.validation_split or data.holdout$"):
        of_classes(none, ("red", "blue"))


# --- KID ---


def unbiased_mmd(x: np.ndarray, y: np.ndarray, scale: float) -> float:
    """The estimator written out: mean kernel over pairs of different images, and over all cross pairs."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / scale + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(a, b) for a in x for b in y) / (m * n)
    return within_x + within_y - 2 * across


def test_kid_of_two_images_each_by_hand():
    """With two of each, every subset is all of them; the mean squared norm of the real ones is (8 + 0) / 2 = 4."""
    generated, real = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    # generated: (0 + 1)^3 = 1; real: 1; across: (4 / 4 + 1)^3 = 8 twice and 1 twice, mean 4.5
    kid = kernel_inception_distance(generated.double(), real.double())
    assert kid.mean == pytest.approx(1 + 1 - 2 * 4.5) and kid.std == pytest.approx(0, abs=1e-9)
    assert unbiased_mmd(generated.numpy(), real.numpy(), 4) == -7


def test_kid_is_the_estimator_over_the_same_subsets():
    generated, real = (normal(9, 5, seed=0) + 0.5).double(), normal(12, 5, seed=1).double()
    state = torch.get_rng_state()
    kid = kernel_inception_distance(generated, real, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    values, scale = [], np.mean([float(y @ y) for y in real.numpy()])
    subsets = torch.Generator().manual_seed(7)
    for _ in range(100):
        some_real, some_generated = (torch.randperm(n, generator=subsets)[:4] for n in (12, 9))  # half of nine
        values.append(unbiased_mmd(generated[some_generated].numpy(), real[some_real].numpy(), scale))
    assert kid.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert kid.std == pytest.approx(np.std(values), rel=1e-9)
    assert kid.std > 0.01


def test_kid_does_not_depend_on_the_scale_of_the_features():
    generated, real = (normal(20, 5, seed=0) + 0.5).double(), normal(30, 5, seed=1).double()
    kid, larger = kernel_inception_distance(generated, real), kernel_inception_distance(7 * generated, 7 * real)
    assert (larger.mean, larger.std) == pytest.approx((kid.mean, kid.std), rel=1e-9)


def test_kid_grows_with_the_distance():
    real, same = normal(400, 8, seed=0).double(), normal(400, 8, seed=1).double()
    kids = [kernel_inception_distance(same + shift, real).mean for shift in (0.0, 0.3, 0.6, 1.0)]
    assert abs(kids[0]) < 0.02 and all(b > a + 0.05 for a, b in zip(kids, kids[1:], strict=False)), kids


# --- both together ---


def test_class_fidelity_by_hand(classifier):
    pipeline, training, held_out = tiny_pipeline(), coloured(), coloured(("red", "green", "blue"), 4, seed=1)
    result = class_fidelity(
        pipeline, classifier, training, held_out, 3, 5, 4, False, num_inference_steps=2, guidance_scale=2.0
    )
    assert result.classes == ("green", "red") and result.per_class == 3
    assert result.held_out == 8 and result.accuracy_real == 1  # the blue ones are of no class
    assert result.class_accuracy_real == {"green": 1, "red": 1}
    # The same images, generated one by one.
    prompts = ["green"] * 3 + ["red"] * 3
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0, "progress": False}
    for i, (prompt, image) in enumerate(zip(prompts, result.images, strict=True)):
        alone = np.asarray(pipeline(prompt, seed=5 + i, **options).images[0]).astype(int)
        assert np.abs(alone - np.asarray(image)).max() <= 1
    with torch.no_grad():
        generated = torch.stack([to_pixels(image) for image in result.images])
        guesses = [classifier.classes[i] for i in classifier(generated).argmax(1)]
        hits = [guess == prompt for guess, prompt in zip(guesses, prompts, strict=True)]
        assert result.accuracy == pytest.approx(sum(hits) / 6)
        assert result.class_accuracy == pytest.approx({"green": sum(hits[:3]) / 3, "red": sum(hits[3:]) / 3})
        real = classifier.features(pixels_of(of_classes(held_out, ("green", "red")))).double()
        features = classifier.features(generated).double()
        some = classifier.features(pixels_of(training.some(6))).double()
    for kid, expected in [
        (result.kid, kernel_inception_distance(features, real)),
        (result.kid_floor, kernel_inception_distance(some, real)),
    ]:
        assert (kid.mean, kid.std) == pytest.approx((expected.mean, expected.std), rel=1e-3, abs=1e-5)
    assert result.kid.mean > result.kid_floor.mean


def test_class_fidelity_refuses(classifier):
    pipeline, images = tiny_pipeline(), coloured()
    with pytest.raises(ValueError, match=r"^per_class is 0, must be at least 1$"):
        class_fidelity(pipeline, classifier, images, images, per_class=0)
    with pytest.raises(ValueError, match=r"^the classifier knows 2 classes"):
        class_fidelity(pipeline, classifier, coloured(("red", "blue")), images)
    with pytest.raises(ValueError, match=r"held-out images are of the 2 classes"):
        class_fidelity(pipeline, classifier, images, coloured(("blue",)))
    grey = coloured(channels=1)
    grey_classifier = train_classifier(grey, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"^the pipeline generates 3 channel\(s\), but the images have 1$"):
        class_fidelity(pipeline, grey_classifier, grey, grey)
