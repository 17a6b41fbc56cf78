"""Stage 1's adversarial loss, learned log-variance, crops and initial weights; the whole script with them."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from scripts import arguments, assert_same_weights, launch, metrics, run_vae
from tiny import normal, tiny_vae
from torch import Tensor

from latentdiff.commands.cli import main
from latentdiff.config import OptimizerConfig, VAELossConfig
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from latentdiff.training.adversarial import AdversarialLoss, DiscriminatorState
from latentdiff.training.checkpoint import checkpoint_folder
from latentdiff.training.optimizer import backward
from latentdiff.training.vae_inputs import random_crops
from latentdiff.training.vae_losses import discriminator_loss, generator_loss
from latentdiff.training.vae_objective import LearnedLogvar

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, betas=(0.9, 0.99), max_grad_norm=None)
# Images of 16 px leave a discriminator of one stride-2 layer some logits.
ADVERSARIAL = [
    *("loss.adversarial=hinge", "loss.adversarial_start=2", "loss.discriminator_width=16"),
    "loss.discriminator_layers=1",
]


def make(accelerator: Accelerator, vae: AutoencoderKL, **changes: object) -> AdversarialLoss:
    loss = VAELossConfig(kl_weight=0.0, **{"adversarial": "hinge", "adversarial_start": 0} | changes)
    state = DiscriminatorState(PatchDiscriminator.from_config(DiscriminatorConfig(3, 16, 1), 0))
    return AdversarialLoss(loss, OPTIMIZER, state, vae.decoder.conv_out.weight, accelerator)


def pixels(count: int = 4) -> Tensor:
    return normal(count, 3, 16, 16, seed=5).clamp(-1, 1)


NO = torch.zeros(())


def test_each_optimiser_has_its_own_weights(accelerator: Accelerator) -> None:
    vae = tiny_vae()
    adversarial = make(accelerator, vae)
    own = {id(p) for p in adversarial.state.parameters()}
    stepped = {id(p) for group in adversarial.optimizer.param_groups for p in group["params"]}
    assert stepped == own and not own & {id(p) for p in vae.parameters()}


def test_the_generator_term_does_not_train_the_discriminator(accelerator: Accelerator) -> None:
    vae = tiny_vae().train()
    adversarial = make(accelerator, vae, adversarial_adaptive=False, adversarial_weight=0.5)
    reconstruction, _ = vae(pixels())
    term, bare = adversarial.generator_term((reconstruction - pixels()).square().mean(), reconstruction, 1.0)
    expected = generator_loss("hinge", adversarial.state(reconstruction))
    torch.testing.assert_close(bare, expected)
    torch.testing.assert_close(term, 0.5 * expected)
    term.backward()
    assert all(p.grad is None for p in adversarial.state.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.decoder.parameters())


def test_the_discriminator_loss_does_not_train_the_autoencoder(accelerator: Accelerator) -> None:
    vae = tiny_vae().train()
    adversarial = make(accelerator, vae)
    reconstruction, _ = vae(pixels())
    loss, accuracy = adversarial.learn(pixels(), reconstruction.detach(), 1.0, last=True)
    real, fake = adversarial.state(pixels()), adversarial.state(reconstruction.detach())
    torch.testing.assert_close(loss, discriminator_loss("hinge", real, fake).detach(), atol=1e-6, rtol=1e-5)
    assert accuracy == pytest.approx(((real > 0).float().mean() + (fake < 0).float().mean()).item() / 2, abs=1e-6)
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.grad is not None for p in adversarial.state.parameters())
    with pytest.raises(AssertionError):
        adversarial.learn(pixels(), reconstruction, 1.0, last=True)
    before = {name: p.clone() for name, p in vae.named_parameters()}
    adversarial.step(1e-2, NO)
    assert all(torch.equal(p, before[name]) for name, p in vae.named_parameters())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_adaptive_weight_is_that_of_the_previous_steps_whole_batch(accelerator: Accelerator, parts: int) -> None:
    """Norms of the two mean gradients at the decoder's last layer; not the mean of the parts' ratios."""
    vae = tiny_vae().train()
    adversarial = make(accelerator, vae)
    for part in pixels().chunk(parts):
        reconstruction, _ = vae(part)
        error = (reconstruction - part).square().mean()
        term, bare = adversarial.generator_term(error, reconstruction, 1 / parts)
        assert term == 0  # in the first step
        backward(accelerator, error + term, 1 / parts)
        adversarial.learn(part, reconstruction.detach(), 1 / parts, last=True)
    reconstruction, _ = vae(pixels())
    last = vae.decoder.conv_out.weight
    of_error = torch.autograd.grad((reconstruction - pixels()).square().mean(), last, retain_graph=True)[0].norm()
    of_adversarial = generator_loss("hinge", adversarial.state(reconstruction))
    of_adversarial = torch.autograd.grad(of_adversarial, last, retain_graph=True)[0].norm()
    adversarial.step(0.0, NO)
    assert adversarial.state.adaptive_weight.item() == pytest.approx(
        (of_error / (of_adversarial + 1e-4)).item(), rel=1e-4
    )
    term, bare = adversarial.generator_term(reconstruction.square().mean(), reconstruction, 1.0)
    torch.testing.assert_close(term, 0.5 * adversarial.state.adaptive_weight * bare)


def test_a_worse_reconstruction_pauses_the_adversarial_term(accelerator: Accelerator) -> None:
    adversarial = make(accelerator, tiny_vae(), adversarial_start=10, adversarial_margin=0.1)
    assert adversarial.update_pause(5, 0.30) is None and adversarial.update_pause(10, 0.20) is None
    assert not adversarial.active(9) and adversarial.active(10)
    assert adversarial.update_pause(15, 0.2199) is None and adversarial.active(15)
    assert (
        "step 20: the reconstruction error is 0.22100, the bound 0.22000; the adversarial term is paused"
        == adversarial.update_pause(20, 0.221)
    )
    assert not adversarial.active(20) and adversarial.update_pause(25, 0.25) is None
    again = make(accelerator, tiny_vae(), adversarial_start=10)
    again.state.load_state_dict(adversarial.state.state_dict())
    assert not again.active(20)
    assert "is resumed" in adversarial.update_pause(30, 0.21) and adversarial.active(30)
    assert adversarial.values()["adversarial_paused"] == 0


def test_a_checkpoint_keeps_the_last_gradient_norm(accelerator: Accelerator) -> None:
    """While the term is paused, the log repeats it, also after a resume."""
    adversarial = make(accelerator, tiny_vae())
    adversarial.learn(pixels(), -pixels(), 1.0, last=True)
    norm = torch.stack([p.grad.norm() for p in adversarial.state.parameters() if p.grad is not None]).norm()
    assert adversarial.clip() == pytest.approx(norm.item(), rel=1e-5) and norm > 0
    again = make(accelerator, tiny_vae())
    again.state.load_state_dict(adversarial.state.state_dict())
    assert again.values() == adversarial.values()


def test_the_logvar_converges_to_the_log_of_the_error(accelerator: Accelerator) -> None:
    """Its optimum is the error itself: then the negative log-likelihood is 1 + log of the error."""
    logvar = LearnedLogvar(OPTIMIZER, accelerator)
    assert [id(p) for group in logvar.optimizer.param_groups for p in group["params"]] == [
        id(logvar.module.log_variance)
    ]
    error = torch.full((4,), 0.05)
    for _ in range(600):
        accelerator.backward(logvar.model(error).mean())
        logvar.step(2e-2, NO)
    assert logvar.module.log_variance.exp().item() == pytest.approx(0.05, rel=1e-2)
    assert logvar.model(error).mean().item() == pytest.approx(1 + torch.tensor(0.05).log().item(), abs=1e-3)


def test_crops_are_squares_of_the_images() -> None:
    whole = torch.arange(2 * 8 * 8.0).view(2, 1, 8, 8)
    crops = random_crops(whole, 4, seed=0, step=3, sample_indices=[5, 6])
    assert crops.shape == (2, 1, 4, 4)
    for crop, image in zip(crops, whole, strict=True):
        top, left = (crop[0, 0, 0] - image[0, 0, 0]).long().item() // 8, crop[0, 0, 0].long().item() % 8
        assert torch.equal(crop, image[:, top : top + 4, left : left + 4])
    assert torch.equal(crops[1:], random_crops(whole[1:], 4, seed=0, step=3, sample_indices=[6]))
    places = {random_crops(whole[:1], 4, 0, step, [0])[0, 0, 0, 0].item() for step in range(200)}
    assert places == {8.0 * y + x for y in range(5) for x in range(5)}


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def adversarial_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything: perceptual term, learned variance, adversarial from step 2 on."""
    return run_vae(tmp_path_factory.mktemp("adversarial"), *ADVERSARIAL, *EVERYTHING)


EVERYTHING = ["loss.perceptual=ms_ssim", "loss.learned_logvar=true", "loss.reconstruction=l1"]


@pytest.mark.runs
def test_the_log_has_every_term(adversarial_run: Path) -> None:
    assert [value > 0 for value in metrics(adversarial_run, "perceptual").values()] == [True] * 6
    discriminator = list(metrics(adversarial_run, "discriminator").values())
    assert discriminator[:2] == [0, 0] and all(value > 0 for value in discriminator[2:])
    assert all(0 <= value <= 1 for value in metrics(adversarial_run, "discriminator_accuracy").values())
    weights = list(metrics(adversarial_run, "adaptive_weight").values())
    assert weights[:2] == [0, 0] and all(value > 0 for value in weights[2:])
    assert all(value > 0 for value in list(metrics(adversarial_run, "discriminator_grad_norm").values())[2:])


@pytest.mark.runs
def test_the_finished_folder_holds_the_autoencoder_alone(adversarial_run: Path) -> None:
    keys = load_file(adversarial_run / "diffusion_pytorch_model.safetensors").keys()
    assert keys == AutoencoderKL.from_pretrained(adversarial_run).state_dict().keys()
    saved = {path.stem for path in checkpoint_folder(adversarial_run, 6).glob("*.safetensors")}
    assert saved == {
        *("model", "ema", "optimizer", "loss_meter", "discriminator", "discriminator_optimizer", "logvar"),
        "logvar_optimizer",
    }
    ema = load_file(checkpoint_folder(adversarial_run, 6) / "ema.safetensors")
    assert not any("discriminator" in key or "variance" in key for key in ema)


@pytest.mark.runs
def test_resume_with_the_discriminator_is_bitwise(adversarial_run: Path, tmp_path: Path) -> None:
    run_vae(
        tmp_path,
        *ADVERSARIAL,
        *EVERYTHING,
        "train.steps=4",
        "output.checkpoint_every=2",
        "optimizer.lr_schedule=constant",
    )
    run_vae(tmp_path, *ADVERSARIAL, *EVERYTHING, "output.checkpoint_every=2", "optimizer.lr_schedule=constant")
    straight = run_vae(tmp_path / "straight", *ADVERSARIAL, *EVERYTHING, "optimizer.lr_schedule=constant")
    for name in (
        "model",
        "ema",
        "optimizer",
        "discriminator",
        "discriminator_optimizer",
        "logvar",
        "logvar_optimizer",
    ):
        assert_same_weights(checkpoint_folder(tmp_path, 6), checkpoint_folder(straight, 6), f"{name}.safetensors")
    for key in ("loss", "discriminator", "adaptive_weight"):
        assert metrics(tmp_path, key) == metrics(straight, key)


@pytest.mark.runs
def test_accumulation_and_processes_with_a_discriminator(tmp_path: Path) -> None:
    """The same curve, so the gradients of both networks are those of the whole batch."""
    options = [*ADVERSARIAL, *EVERYTHING, "loss.discriminator_width=8"]
    alone = run_vae(tmp_path / "alone", *options)
    run_vae(tmp_path / "accumulated", *options, "train.micro_batch_size=2")
    launch(2, arguments(1, tmp_path / "two", None, *options))
    for folder in (tmp_path / "accumulated", tmp_path / "two"):
        for key in ("loss", "reconstruction", "adversarial", "discriminator", "adaptive_weight"):
            assert metrics(folder, key) == pytest.approx(metrics(alone, key), rel=1e-5, abs=1e-7), key


@pytest.mark.runs
def test_a_discriminator_may_be_added_later(tmp_path: Path) -> None:
    run_vae(tmp_path, "train.steps=3")
    run_vae(tmp_path, *ADVERSARIAL)
    assert list(metrics(tmp_path, "discriminator")) == [4, 5, 6]


@pytest.mark.runs
def test_a_frozen_encoder_keeps_the_latents(vae_run: Path, tmp_path: Path) -> None:
    run_vae(tmp_path, f"init_from={vae_run}", "freeze_encoder=true")
    before, after = AutoencoderKL.from_pretrained(vae_run), AutoencoderKL.from_pretrained(tmp_path)
    image = pixels(2)
    with torch.no_grad():
        moments = before.encode(image)
        assert torch.equal(moments, after.encode(image))
        assert torch.equal(before.sample(moments), after.sample(moments))
        assert not torch.equal(before.decode(before.sample(moments)), after.decode(after.sample(moments)))
    assert before.config == after.config


@pytest.mark.runs
def test_posthoc_averages_of_a_run_with_a_frozen_encoder(vae_run: Path, tmp_path: Path) -> None:
    """`latentdiff ema` averages the decoder alone and leaves the latents unchanged."""
    run_vae(tmp_path, f"init_from={vae_run}", "freeze_encoder=true", "ema.snapshot_every=2")
    main(["ema", str(tmp_path), "--length", "0.1", "--no-progress", "--device", "cpu"])
    before, average = AutoencoderKL.from_pretrained(vae_run), AutoencoderKL.from_pretrained(tmp_path / "ema-0.100")
    assert before.config == average.config
    assert torch.equal(before.encoder.conv_in.weight, average.encoder.conv_in.weight)
    assert not torch.equal(before.decoder.conv_in.weight, average.decoder.conv_in.weight)


@pytest.mark.runs
def test_fine_tuning_measures_one_factor(vae_run: Path, tmp_path: Path) -> None:
    """From an autoencoder with a scaling_factor of its own: its quant_conv is not folded into."""
    given = AutoencoderKL.from_pretrained(vae_run)
    given.config = given.config.model_copy(update={"scaling_factor": 0.5})
    given.save_pretrained(tmp_path / "given")
    run_vae(tmp_path / "tuned", f"init_from={tmp_path / 'given'}", "optimizer.lr=1.0e-8", "optimizer.min_lr=0.0")
    tuned = AutoencoderKL.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(tuned.quant_conv.weight, given.quant_conv.weight, atol=1e-6, rtol=0)
    # With this factor the given one's latents have unit scale (stage 1 sees to that).
    assert tuned.config.scaling_factor == pytest.approx(0.18215, rel=0.02)


@pytest.mark.runs
def test_the_micro_batch_search_changes_nothing(adversarial_run: Path, tmp_path: Path) -> None:
    run_vae(tmp_path, *ADVERSARIAL, *EVERYTHING, "train.micro_batch_size=auto")
    assert metrics(tmp_path, "loss") == metrics(adversarial_run, "loss")


@pytest.mark.runs
def test_training_on_crops(tmp_path: Path) -> None:
    run_vae(tmp_path / "crops", "train.crop_size=8")
    assert list(metrics(tmp_path / "crops", "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(tmp_path / "crops", "validation/psnr")) == [0, 3, 6]
    # The last two steps on whole images: until then the same run, then another one.
    run_vae(tmp_path / "both", "train.crop_size=8", "train.whole_image_steps=2")
    crops, both = metrics(tmp_path / "crops", "loss"), metrics(tmp_path / "both", "loss")
    assert [step for step in crops if crops[step] == both[step]] == [1, 2, 3, 4]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["freeze_encoder=true"], "freeze_encoder needs init_from"),
        (["train.crop_size=9"], "train.crop_size is 9, must be a multiple of 2 and at most data.size 16"),
        (["train.crop_size=32"], "train.crop_size is 32, must be"),
        (["train.whole_image_steps=2"], "train.whole_image_steps is 2, must be 0 without train.crop_size, and at most"),
        (
            ["loss.adversarial=hinge"],
            "loss.discriminator_layers 3 needs images of 24 px, these have 16: use fewer layers",
        ),
        (
            ["loss.perceptual=ms_ssim", "train.crop_size=8"],
            "loss.perceptual ms_ssim needs images of 11 px, these have 8",
        ),
        (["loss.perceptual=vgg"], "loss.perceptual: Input should be 'ms_ssim' or 'lpips'"),
    ],
)
def test_wrong_configs_are_named(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_vae(tmp_path, *overrides)


@pytest.mark.runs
def test_init_from_a_model_of_another_shape_is_refused(vae_run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model.block_out_channels is \(16, 16\), but the autoencoder in .* has \(8, 16\)"
    ):
        run_vae(tmp_path, f"init_from={vae_run}", "model.block_out_channels=[16, 16]")
