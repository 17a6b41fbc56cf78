"""The pipeline against diffusers' from the same folder, its promises about seeds, and wrong inputs."""

import copy
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from model_pairs import transformers_twin
from PIL import Image
from tiny import (
    SD1_SCHEDULER,
    UNET,
    VAE,
    normal,
    perturb,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    tokenizer,
)

from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline, PipelineOutput

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy

PROMPTS = ["a red apple", "green boat at night", "the quick brown fox"]


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusionPipeline:
    """Shared: a test must leave it as it was."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The saved pipeline in a folder that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copied")


def generate(
    pipeline: LatentDiffusionPipeline, prompt: str | list[str] = PROMPTS[0], **changes: object
) -> PipelineOutput:
    return pipeline(prompt, **{"seed": 1, "num_inference_steps": 4, "guidance_scale": 3.0, "progress": False} | changes)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a: list[Image.Image], b: list[Image.Image]) -> int:
    """Largest difference of a colour value, of 255."""
    assert [image.size for image in a] == [image.size for image in b]
    return max(int(np.abs(array(x) - array(y)).max()) for x, y in zip(a, b, strict=True))


def is_an_image(image: Image.Image) -> bool:
    return image.mode == "RGB" and array(image).std() > 20


# ----------------------------------------------------------------------------------------------------------------------
# The same image as diffusers


def open_in_diffusers(folder: Path) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.runs
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_our_folder_generates_equal_images_in_diffusers(
    pipeline: LatentDiffusionPipeline, copied: Path, prediction_type: str
) -> None:
    ours = LatentDiffusionPipeline(
        pipeline.vae,
        pipeline.unet,
        pipeline.text_encoder,
        pipeline.tokenizer,
        NoiseSchedule(prediction_type=prediction_type, steps_offset=1),
    )
    ours.save_pretrained(copied)
    theirs = open_in_diffusers(copied)
    assert type(theirs.scheduler) is diffusers.DDIMScheduler
    assert theirs.scheduler.config.prediction_type == prediction_type

    for size in ({}, {"height": 16, "width": 24}):
        latents = normal(2, 4, size.get("height", 16) // 2, size.get("width", 16) // 2)
        options = {"num_inference_steps": 10, "guidance_scale": 3.0, "negative_prompt": ["blue", "cold, wet"], **size}
        images = ours(PROMPTS[:2], latents=latents, progress=False, **options).images
        expected = theirs(PROMPTS[:2], latents=latents, **options).images
        assert all(is_an_image(image) for image in images)
        assert difference(images, expected) <= 2
        assert difference(images[:1], images[1:]) > 20

    without = theirs(PROMPTS[:1], latents=latents[:1], num_inference_steps=10, guidance_scale=1.0, **size).images
    images = ours(PROMPTS[0], latents=latents[:1], num_inference_steps=10, guidance_scale=1.0, progress=False, **size)
    assert difference(images.images, without) <= 2


@pytest.mark.runs
def test_pooled_text_generates_equal_images_in_diffusers(pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    """Of both branches, for each image; also where only one branch runs."""
    unet = tiny_unet(addition_embed_type="text", addition_embed_type_num_heads=2)
    parts = (pipeline.vae, unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.schedule)
    ours = LatentDiffusionPipeline(*parts)
    ours.save_pretrained(tmp_path)
    theirs = open_in_diffusers(tmp_path)
    latents = normal(2, 4, 8, 8)
    for scale in (3.0, 1.0):
        options = {"num_inference_steps": 6, "guidance_scale": scale, "latents": latents}
        images = ours(PROMPTS[:2], progress=False, **options).images
        assert difference(images, theirs(PROMPTS[:2], **options).images) <= 2
        assert difference(images[:1], images[1:]) > 20
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert opened.unet.config == unet.config


SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm2": diffusers.KDPM2DiscreteScheduler,
    "dpm2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpm++2s": diffusers.DPMSolverSinglestepScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++2m_sde": diffusers.DPMSolverMultistepScheduler,
    "dpm++3m_sde": diffusers.DPMSolverMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
OWN_KEYS = {
    "dpm++2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "dpm++3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> diffusers.StableDiffusionPipeline:
    """A pipeline made and saved by diffusers; a test may exchange its scheduler."""
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer().save(folder)
    pipe = diffusers.StableDiffusionPipeline(
        vae=perturb(diffusers.AutoencoderKL(**VAE)).eval(),
        unet=perturb(diffusers.UNet2DConditionModel(**UNET)).eval(),
        text_encoder=transformers_twin(tiny_text_encoder()),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        scheduler=diffusers.PNDMScheduler(**SD1_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_sampler_has_a_scheduler() -> None:
    assert SCHEDULERS.keys() == SAMPLERS.keys()


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Not dpm++3m_sde, where diffusers has a constant wrong; see samplers.dpm_solver_pp_3m_sde
        *((name, {}) for name in SCHEDULERS if name != "dpm++3m_sde"),
        ("euler", {"use_karras_sigmas": True}),
        ("heun", {"use_karras_sigmas": True}),
        ("lms", {"use_exponential_sigmas": True}),
        ("dpm++2m", {"use_karras_sigmas": True}),
        ("unipc", {"use_karras_sigmas": True}),
        ("dpm++2m", {"timestep_spacing": "trailing"}),
        ("ddim", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ],
)
def test_a_folder_of_diffusers_generates_equal_images_here(
    name: str, changes: dict, theirs: diffusers.StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Its scheduler_config.json picks the sampler, and the same seeds give the same images."""
    config = {**SD1_SCHEDULER, "clip_sample": False, **OWN_KEYS.get(name, {}), **changes}
    config = {key: value for key, value in config.items() if key != "skip_prk_steps" or name == "pndm"}
    theirs.scheduler = SCHEDULERS[name].from_config(config)
    theirs.save_pretrained(tmp_path)
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    karras = "karras" if "use_karras_sigmas" in changes else "schedule"
    sigmas = "exponential" if "use_exponential_sigmas" in changes else karras
    assert ours.defaults == GenerationDefaults(sampler=name, sigmas=sigmas)

    options = {"num_inference_steps": 8, "guidance_scale": 3.0}
    images = ours(PROMPTS[:2], seed=[3, 4], progress=False, **options).images
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = theirs(PROMPTS[:2], generator=generators, **options).images
    assert all(is_an_image(image) for image in images)
    assert difference(images, expected) <= 2

    # The scheduler that is saved here generates equal images in diffusers.
    ours.save_pretrained(tmp_path / "again")
    theirs.scheduler = SCHEDULERS[name].from_pretrained(tmp_path / "again", subfolder="scheduler")
    assert diffusers.DiffusionPipeline.load_config(tmp_path / "again")["scheduler"] == [
        "diffusers",
        SCHEDULERS[name].__name__,
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert difference(theirs(PROMPTS[:2], generator=generators, **options).images, images) <= 2


def test_an_exchanged_scheduler_wins_over_older_defaults(copied: Path) -> None:
    """Whoever saves another scheduler into the folder with diffusers means it."""
    scheduler = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    scheduler.write_text(json.dumps(config))
    ours = LatentDiffusionPipeline.from_pretrained(copied)
    assert (ours.defaults.sampler, ours.defaults.sigmas) == ("euler", "karras")
    (copied / "generation_config.json").write_text('{"num_inference_steps": 20}')
    assert LatentDiffusionPipeline.from_pretrained(copied).defaults == GenerationDefaults(
        num_inference_steps=20, sampler="euler", sigmas="karras"
    )
    (copied / "generation_config.json").write_text('{"num_inference_steps": "x"}')
    with pytest.raises(ValueError, match="generation_config.json: num_inference_steps is 'x', must be an integer"):
        LatentDiffusionPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    ("sampler", "sigmas", "zero", "expected"),
    [
        ("ddim", "karras", False, "DDIMScheduler does not support karras sigmas"),
        ("heun", "schedule", True, "HeunDiscreteScheduler does not support zero terminal SNR"),
        ("euler", "karras", True, None),
    ],
)
def test_differences_to_diffusers_are_reported(
    pipeline: LatentDiffusionPipeline, tmp_path: Path, sampler: str, sigmas: str, zero: bool, expected: str | None
) -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    parts = pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    ours = LatentDiffusionPipeline(*parts, schedule, GenerationDefaults(sampler=sampler, sigmas=sigmas))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.save_pretrained(tmp_path)
    messages = [str(warning.message) for warning in caught if "diffusers" in str(warning.message)]
    assert [expected in message for message in messages] == ([True] if expected else [])
    assert LatentDiffusionPipeline.from_pretrained(tmp_path).defaults == ours.defaults


def test_defaults_that_no_call_could_use_are_refused() -> None:
    for values, message in [({"sampler": "foo"}, "unknown sampler 'foo'"), ({"sigmas": "foo"}, "sigmas is 'foo'")]:
        with pytest.raises(ValueError, match=message):
            GenerationDefaults(**values)


def test_unsupported_variants_of_a_scheduler_are_reported(
    theirs: diffusers.StableDiffusionPipeline, tmp_path: Path
) -> None:
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        {**SD1_SCHEDULER, "algorithm_type": "dpmsolver++", "solver_order": 3, "use_lu_lambdas": True}
    )
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="use_lu_lambdas True, solver_order 3 is not supported; sampling with dpm"):
        ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert ours.defaults.sampler == "dpm++2m"


def test_variant_of_a_whole_folder(pipeline: LatentDiffusionPipeline, saved: Path, tmp_path: Path) -> None:
    theirs = open_in_diffusers(saved).to(torch.float16)
    theirs.save_pretrained(tmp_path, variant="fp16")
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float32)
    assert ours.dtype == torch.float32
    # float16 weights are 1e-3 off: the same image, not to the last bit.
    assert np.abs(array(generate(ours)[0]) - array(generate(pipeline)[0])).mean() < 5
    with pytest.raises(ValueError, match=r"unet.diffusion_pytorch_model\.safetensors does not exist"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and opening


def test_round_trip(pipeline: LatentDiffusionPipeline, saved: Path) -> None:
    opened = LatentDiffusionPipeline.from_pretrained(str(saved))
    assert difference(generate(opened).images, generate(pipeline).images) == 0
    assert opened.schedule == pipeline.schedule and opened.defaults == pipeline.defaults
    assert not any(module.training for module in (opened.vae, opened.unet, opened.text_encoder))


def test_saved_files(saved: Path) -> None:
    files = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    assert {Path(name).suffix for name in files} == {".json", ".txt", ".safetensors"}
    assert set(files) >= {
        "generation_config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert not any(Path(name).name.startswith(".") for name in files)


def test_index_comes_last(pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    """A folder whose writing fails, at any of the parts, is not a pipeline folder."""
    for part in ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        folder = tmp_path / part.replace("/", "-")
        (folder / part / "in the way").mkdir(parents=True)
        with pytest.raises(OSError):
            pipeline.save_pretrained(folder)
        assert not (folder / "model_index.json").exists()
        with pytest.raises(ValueError, match="model_index.json does not exist"):
            LatentDiffusionPipeline.from_pretrained(folder)


@pytest.mark.runs
def test_generation_defaults_are_kept_and_used(pipeline: LatentDiffusionPipeline, copied: Path) -> None:
    defaults = GenerationDefaults(num_inference_steps=3, guidance_scale=1.0, sampler="dpm++2m")
    parts = pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.schedule
    LatentDiffusionPipeline(*parts, defaults).save_pretrained(copied)
    written = json.loads((copied / "generation_config.json").read_text())
    assert written == {"num_inference_steps": 3, "guidance_scale": 1.0, "guidance_rescale": 0.0}
    opened = LatentDiffusionPipeline.from_pretrained(copied)
    assert opened.defaults == defaults
    steps = []
    generated = opened(PROMPTS[0], seed=1, progress=False, callback=lambda step, *_: steps.append(step))
    assert steps == [0, 1, 2]
    explicit = {"num_inference_steps": 3, "guidance_scale": 1.0, "sampler": "dpm++2m"}
    assert difference(generated.images, generate(pipeline, **explicit).images) == 0
    # What a call says goes first.
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": "ddim"}
    assert difference(generate(opened, **options).images, generate(pipeline).images) == 0

    opened.save_pretrained(copied)
    assert LatentDiffusionPipeline.from_pretrained(copied).defaults == defaults

    (copied / "generation_config.json").write_text(r'{"\u001b[31m": 3}')
    known = "num_inference_steps, guidance_scale, guidance_rescale, sampler, sigmas"
    with pytest.raises(ValueError, match=rf"/generation_config.json has the key '\\x1b\[31m', must be of {known}$"):
        LatentDiffusionPipeline.from_pretrained(copied)


def test_missing_folders_and_parts_are_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^pipeline '.*nowhere' does not exist"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^pipeline 'no-such-model' is no folder or file here, and was not loaded"):
        LatentDiffusionPipeline.from_pretrained("no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="model_index.json does not exist"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="single file is opened by its own name: .*/model.safetensors"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"does not exist: .* is one part of a model \('AutoencoderKL'\)"):
        LatentDiffusionPipeline.from_pretrained(copied / "vae")
    for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
        (copied / part).rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"copied has no {part}/"):
            LatentDiffusionPipeline.from_pretrained(copied)
        (tmp_path / "elsewhere").rename(copied / part)


def test_broken_parts_are_named(copied: Path) -> None:
    def broken(file: str, content: str, message: str) -> None:
        before = (copied / file).read_bytes()
        (copied / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            LatentDiffusionPipeline.from_pretrained(copied)
        (copied / file).write_bytes(before)

    broken("model_index.json", "{", "model_index.json is not valid JSON")
    broken("scheduler/scheduler_config.json", "{}", "scheduler_config.json: _class_name is None")
    broken("unet/config.json", "{}", "unet/config.json: key block_out_channels is missing")
    broken("unet/diffusion_pytorch_model.safetensors", "", "unet/diffusion_pytorch_model.safetensors is truncated")
    broken("text_encoder/model.safetensors", "", "text_encoder.model.safetensors is truncated")
    LatentDiffusionPipeline.from_pretrained(copied)


def test_parts_must_fit_together(pipeline: LatentDiffusionPipeline) -> None:
    parts = {
        "vae": pipeline.vae,
        "unet": pipeline.unet,
        "text_encoder": pipeline.text_encoder,
        "tokenizer": pipeline.tokenizer,
        "schedule": pipeline.schedule,
    }
    with pytest.raises(ValueError, match="UNet takes 4 latent channels, but the autoencoder gives 8"):
        LatentDiffusionPipeline(**parts | {"vae": tiny_vae(latent_channels=8)})
    with pytest.raises(ValueError, match="the UNet takes 4 channels, but gives 3"):
        LatentDiffusionPipeline(**parts | {"unet": tiny_unet(out_channels=3)})
    with pytest.raises(ValueError, match="cross_attention_dim is 24, but the text encoder is 16 wide"):
        LatentDiffusionPipeline(**parts | {"unet": tiny_unet(cross_attention_dim=24)})
    with pytest.raises(ValueError, match="rows of 77 tokens, but the text encoder reads at most 32"):
        LatentDiffusionPipeline(**parts | {"text_encoder": tiny_text_encoder(max_position_embeddings=32)})


def test_a_short_text_encoder_with_its_tokenizer(tmp_path: Path) -> None:
    short = LatentDiffusionPipeline(
        tiny_vae(),
        tiny_unet(),
        tiny_text_encoder(max_position_embeddings=32),
        CLIPTokenizer.load(max_length=32),
        NoiseSchedule(),
    )
    short.save_pretrained(tmp_path)
    assert short.encode_prompts(PROMPTS).shape == (3, 32, 16)
    assert difference(generate(LatentDiffusionPipeline.from_pretrained(tmp_path)).images, generate(short).images) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(pipeline: LatentDiffusionPipeline, sampler: str) -> None:
    together = generate(pipeline, PROMPTS, seed=[7, 8, 7], sampler=sampler)
    for i, seed in enumerate([7, 8, 7]):
        alone = generate(pipeline, PROMPTS[i], seed=seed, sampler=sampler)
        assert difference(alone.images, together[i : i + 1]) <= 1
    reversed_batch = generate(pipeline, PROMPTS[::-1], seed=[7, 8, 7], sampler=sampler)
    assert difference(reversed_batch.images, together[::-1]) <= 1
    other_seed = generate(pipeline, PROMPTS[0], seed=9, sampler=sampler)
    assert difference(other_seed.images, together[:1]) > 20


def test_seeds_count_up_from_an_integer(pipeline: LatentDiffusionPipeline) -> None:
    output = generate(pipeline, PROMPTS, seed=5)
    assert output.seeds == [5, 6, 7]
    assert difference(output.images, generate(pipeline, PROMPTS, seed=[5, 6, 7]).images) == 0
    assert difference(output.images, generate(pipeline, PROMPTS, seed=range(5, 8)).images) == 0


def test_seeds_of_any_integer_kind(pipeline: LatentDiffusionPipeline) -> None:
    expected = generate(pipeline, PROMPTS[:2], seed=[3, 4])
    for seed in (np.int64(3), np.array([3, 4]), torch.tensor([3, 4]), torch.tensor(3), (3, 4)):
        output = generate(pipeline, PROMPTS[:2], seed=seed)
        assert output.seeds == [3, 4] and all(type(s) is int for s in output.seeds)
        assert difference(output.images, expected.images) == 0


def test_random_seeds_are_reported(pipeline: LatentDiffusionPipeline) -> None:
    first, second = generate(pipeline, PROMPTS[:2], seed=None), generate(pipeline, PROMPTS[:2], seed=None)
    assert len(first.seeds) == 2 and not set(first.seeds) & set(second.seeds)
    assert difference(first.images, generate(pipeline, PROMPTS[:2], seed=first.seeds).images) == 0
    assert difference(first.images, second.images) > 20


def test_several_images_of_a_prompt_follow_one_another(pipeline: LatentDiffusionPipeline) -> None:
    output = generate(pipeline, PROMPTS[:2], negative_prompt=["blue", ""], num_images_per_prompt=2, seed=10)
    assert output.seeds == [10, 11, 12, 13]
    for i, (prompt, negative) in enumerate([(PROMPTS[0], "blue")] * 2 + [(PROMPTS[1], "")] * 2):
        alone = generate(pipeline, prompt, negative_prompt=negative, seed=10 + i)
        assert difference(alone.images, output[i : i + 1]) <= 1
    assert difference(output[:1], output[1:2]) > 20


def test_global_random_state_is_left_alone(pipeline: LatentDiffusionPipeline) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for sampler in SAMPLERS:
        generate(pipeline, sampler=sampler, seed=None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    first = generate(pipeline)
    torch.manual_seed(99)
    assert difference(first.images, generate(pipeline).images) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def unet_batches(pipeline: LatentDiffusionPipeline, **options: object) -> list[int]:
    """Batch sizes of the UNet calls of a generation."""
    sizes = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        generate(pipeline, PROMPTS[:2], num_inference_steps=3, **options)
    finally:
        hook.remove()
    return sizes


def test_guidance_doubles_the_batch(pipeline: LatentDiffusionPipeline) -> None:
    assert unet_batches(pipeline, guidance_scale=3.0) == [4, 4, 4]
    assert unet_batches(pipeline, guidance_scale=0.0) == [4, 4, 4]
    assert unet_batches(pipeline, guidance_scale=1.0) == [2, 2, 2]
    assert unet_batches(pipeline, guidance_scale=1, negative_prompt="blue") == [2, 2, 2]


def test_negative_prompt_is_the_other_end_of_guidance(pipeline: LatentDiffusionPipeline) -> None:
    """Output = negative + w (prompt - negative): exchanging the two is the same as w -> 1 - w."""
    a, b = PROMPTS[:2]
    mixed = generate(pipeline, a, negative_prompt=b, guidance_scale=0.25)
    assert difference(mixed.images, generate(pipeline, b, negative_prompt=a, guidance_scale=0.75).images) <= 1
    assert difference(mixed.images, generate(pipeline, a, negative_prompt=b, guidance_scale=0.75).images) > 1

    only_b = generate(pipeline, b, guidance_scale=1.0)
    assert difference(generate(pipeline, a, negative_prompt=b, guidance_scale=0.0).images, only_b.images) <= 1
    assert difference(generate(pipeline, b, negative_prompt=b, guidance_scale=9.0).images, only_b.images) <= 1

    default = generate(pipeline, a)
    assert difference(default.images, generate(pipeline, a, negative_prompt="").images) == 0
    assert difference(default.images, generate(pipeline, a, negative_prompt=b).images) > 5
    both = generate(pipeline, [a, a], negative_prompt=["", b], seed=[1, 1])
    assert difference(both[:1], default.images) <= 1
    assert difference(both[1:], generate(pipeline, a, negative_prompt=b).images) <= 1


def test_the_prompt_changes_the_image(pipeline: LatentDiffusionPipeline) -> None:
    assert difference(generate(pipeline, PROMPTS[0]).images, generate(pipeline, PROMPTS[1]).images) > 5
    assert difference(generate(pipeline, "A  Red\napple ").images, generate(pipeline, "a red apple").images) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Sizes, samplers, latents, callback, output


def test_sizes(pipeline: LatentDiffusionPipeline) -> None:
    assert generate(pipeline)[0].size == (16, 16)
    assert generate(pipeline, height=24)[0].size == (16, 24)  # PIL: width, height
    wide = generate(pipeline, PROMPTS, height=12, width=20)
    assert [image.size for image in wide] == [(20, 12)] * 3
    assert all(is_an_image(image) for image in wide)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images(pipeline: LatentDiffusionPipeline, channels: int) -> None:
    vae = tiny_vae(in_channels=channels, out_channels=channels)
    other = LatentDiffusionPipeline(vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.schedule)
    assert generate(other)[0].mode == {1: "L", 4: "RGBA"}[channels]


@pytest.fixture(scope="module")
def of_every_sampler(pipeline: LatentDiffusionPipeline) -> dict[str, list[Image.Image]]:
    return {name: generate(pipeline, sampler=name, guidance_scale=2.0).images for name in SAMPLERS}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(
    pipeline: LatentDiffusionPipeline, of_every_sampler: dict[str, list[Image.Image]], name: str
) -> None:
    """A call is the sampler of that name on the UNet's guided prediction, then the decoder."""
    images = of_every_sampler[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 8, generator=generator)[None]
    prompt, empty = pipeline.encode_prompts([PROMPTS[0], ""]).detach().split(1)

    def denoise(x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        t = torch.tensor([level.timestep])
        guided = 2 * pipeline.unet(x, t, prompt) - pipeline.unet(x, t, empty)
        return pipeline.schedule.predict_x0(guided, x, level)

    sampler = get_sampler(name)
    levels = sampler.levels(pipeline.schedule, 4)
    with torch.no_grad():
        latents = sampler(denoise, x, pipeline.schedule, levels, [generator])
        pixels = pipeline.vae.decode(latents)[0].permute(1, 2, 0)
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(array(images[0]) - expected).max() <= 1
    # With few "trailing" steps these take the same ones.
    same = [{"ddim", "euler"}, {"ddpm", "euler_ancestral"}, {"dpm++2m_sde", "dpm++3m_sde"}]
    others = [other for other in SAMPLERS if other != name and {other, name} not in same]
    assert all(difference(images, of_every_sampler[other]) > 1 for other in others)


def test_given_latents_are_the_starting_noise(pipeline: LatentDiffusionPipeline) -> None:
    of_seed_1 = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    given = generate(pipeline, [PROMPTS[0]] * 2, latents=torch.stack([of_seed_1, normal(4, 8, 8, seed=2)]), seed=77)
    assert difference(given[:1], generate(pipeline, seed=1).images) <= 1
    assert difference(given[1:], generate(pipeline, seed=2).images) <= 1

    latents = normal(1, 4, 8, 8)
    before = latents.clone()
    generate(pipeline, latents=latents)
    assert torch.equal(latents, before)


def test_callback_sees_every_step(pipeline: LatentDiffusionPipeline) -> None:
    seen = []
    output = generate(pipeline, PROMPTS[:2], callback=lambda *arguments: seen.append(arguments))
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, *_ in seen] == [999, 749, 499, 249]
    for _, _, latents, x0 in seen:
        assert latents.shape == x0.shape == (2, 4, 8, 8)
        assert not latents.requires_grad
    *_, latents, x0 = seen[-1]
    assert torch.allclose(latents, x0, rtol=1e-4, atol=1e-4)  # the last step ends at clean latents
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents).clamp(-1, 1)
    expected = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([array(image) for image in output]) - expected).max() == 0


def test_output_is_a_sequence_of_images(pipeline: LatentDiffusionPipeline) -> None:
    output = generate(pipeline, PROMPTS)
    assert len(output) == 3 and list(output) == output.images
    assert output[0] is output.images[0] and output[-1] is output.images[2]
    assert output[1:] == output.images[1:]
    first, second, third = output
    assert second is output.images[1]
    assert third in output and output.index(third) == 2
    with pytest.raises(IndexError):
        output[3]


def test_progress_bar(pipeline: LatentDiffusionPipeline, capsys: pytest.CaptureFixture) -> None:
    generate(pipeline, progress=False)
    assert capsys.readouterr() == ("", "")
    generate(pipeline, progress=True, sampler="dpm++2m")
    out, err = capsys.readouterr()
    assert out == "" and "dpm++2m" in err and "/4 " in err


# ----------------------------------------------------------------------------------------------------------------------
# Modes, dtypes


def test_modes_are_restored(pipeline: LatentDiffusionPipeline) -> None:
    other = copy.deepcopy(pipeline)
    other.unet.train()
    other.unet.mid_block.eval()
    other.text_encoder.train()

    def modes() -> list[bool]:
        return [m.training for part in (other.vae, other.unet, other.text_encoder) for m in part.modules()]

    before = modes()
    during = []
    generated = generate(other, callback=lambda *_: during.extend(modes()))
    assert modes() == before and True in before and not any(during)
    assert difference(generated.images, generate(pipeline).images) == 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(other, callback=interrupt)
    assert modes() == before
    assert all(parameter.grad is None for parameter in other.unet.parameters())


def test_dtypes(pipeline: LatentDiffusionPipeline, saved: Path) -> None:
    reference = array(generate(pipeline)[0])
    moved = copy.deepcopy(pipeline).to(dtype=torch.bfloat16)
    opened = LatentDiffusionPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    seen, latents = [], []
    for half in (moved, opened):
        assert half.dtype == torch.bfloat16 and half.device.type == "cpu"
        assert {parameter.dtype for parameter in half.vae.parameters()} == {torch.bfloat16}
        hook = half.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        generated = generate(half, callback=lambda *arguments: latents.append(arguments[2].dtype))
        hook.remove()
        assert np.abs(array(generated[0]) - reference).mean() < 25  # 8 bits of mantissa, through a random network
    assert set(seen) == {torch.bfloat16} and set(latents) == {torch.float32}  # rounding does not add up over the steps
    assert difference(generate(moved).images, generate(opened).images) == 0
    assert pipeline.dtype == torch.float32

    mixed = copy.deepcopy(pipeline)  # a float32 autoencoder behind a bfloat16 UNet
    mixed.unet.to(torch.bfloat16)
    assert np.abs(array(generate(mixed)[0]) - reference).mean() < 25


def test_latents_that_are_not_finite_are_an_error(pipeline: LatentDiffusionPipeline) -> None:
    broken = copy.deepcopy(pipeline)
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite with torch.float32"):
        generate(broken)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 5}, "prompt is 5, must be a text or a list of texts"),
        ({"prompt": None}, "give either a prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 77, 16)}, "give either a prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 77, 8)}, r"prompt_embeds are \[1, 77, 8\], must be .*, 16\]"),
        ({"negative_prompt_embeds": torch.zeros(2, 77, 16)}, r"\[2, 77, 16\], must be \[1, tokens, 16\]"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1.5, must be in 0 \.\. 1"),
        ({"guidance_interval": (5, 1)}, r"guidance_interval is \(5, 1\), must be two noise levels"),
        ({"clip_skip": 2}, r"clip_skip is 2, must be in 0 \.\. 1"),
        ({"clip_skip": -1}, r"clip_skip is -1, must be in 0 \.\. 1"),
        ({"eta": 0.5, "sampler": "euler"}, "eta is 0.5 with euler, must be in 0 .. 1, and only ddim has it"),
        ({"eta": 2.0}, "eta is 2.0 with ddim"),
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"tile": 4}, "tile is 4"),
        ({"sigmas": "linear"}, "sigmas is 'linear', must be one of schedule, karras, exponential, beta"),
        ({"stepps": 3}, "unknown option 'stepps', must be one of num_inference_steps,"),
        ({"prompt": ["a", 5]}, "prompt 1 is 5, must be a text"),
        ({"prompt": b"a"}, "prompt 0 is 97, must be a text"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt has 1 texts, but there are 2 prompts"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"], "num_images_per_prompt": 3}, "has 1 texts.* are 2 prompts"),
        ({"negative_prompt": []}, "negative_prompt has 0 texts, but there are 1 prompts"),
        ({"negative_prompt": [None], "guidance_scale": 1.0}, "negative_prompt 0 is None, must be a text"),
        ({"negative_prompt": 5}, "negative_prompt is 5, must be a text or a list of texts"),
        ({"seed": [1, 2]}, "seed has 2 entries, but there are 1 images to generate"),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 2, "seed": [1, 2]}, "seed has 2 .* are 4 images"),
        ({"seed": -1}, "seed -1 is not an integer in 0"),
        ({"seed": [2**63]}, "is not an integer in 0 .. 2\\*\\*63 - 1"),
        ({"seed": ["1"]}, "seed '1' is not an integer"),
        ({"seed": 1.5}, "seed is 1.5, must be an integer or a list"),
        ({"seed": [True]}, "seed True is not an integer"),
        ({"num_inference_steps": 3.0}, "num_inference_steps is 3.0, must be an integer"),
        ({"guidance_scale": "3"}, "guidance_scale is '3', must be a number"),
        ({"height": 16.0}, "height is 16.0, must be an integer"),
        ({"tile": 8.5}, "tile is 8.5, must be an integer"),
        (
            {"prompt": None, "prompt_embeds": np.zeros((1, 77, 16))},
            "prompt_embeds are of type ndarray, must be a tensor",
        ),
        ({"height": 18}, "height is 18, must be a multiple of 4"),
        ({"width": 15}, "width is 15, must be a multiple of 4"),
        ({"height": 0}, "height is 0, must be a multiple of 4"),
        ({"width": 0}, "width is 0, must be a multiple of 4"),
        ({"height": -16}, "height is -16, must be a multiple of 4"),
        ({"height": 16388}, "height is 16388, must be a multiple of 4 up to 16384"),
        ({"num_images_per_prompt": 10**9}, "1 prompts with .* are 1,000,000,000 images, at most 100,000 are made at"),
        ({"num_inference_steps": 0}, r"num_inference_steps is 0, must be in 1 \.\. 1000"),
        ({"num_inference_steps": 1001}, r"num_inference_steps is 1001, must be in 1 \.\. 1000"),
        ({"sampler": "eule"}, r"unknown sampler 'eule', must be one of ddpm, ddim, euler, .*dpm\+\+2m"),
        ({"sampler": ""}, "unknown sampler ''"),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5, must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, must be a finite number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0, must be at least 1"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, re.escape("latents are [1, 4, 8, 9], must be [1, 4, 8, 8]")),
        ({"latents": torch.zeros(4, 8, 8)}, re.escape("latents are [4, 8, 8], must be [1, 4, 8, 8]")),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 24}, re.escape("must be [1, 4, 12, 8]")),
    ],
)
def test_wrong_inputs_are_named_before_anything_is_computed(
    pipeline: LatentDiffusionPipeline, options: dict, message: str
) -> None:
    calls = []
    hook = pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            generate(pipeline, options.pop("prompt", "a"), **options)
    finally:
        hook.remove()
    assert not calls


def test_a_long_prompt_is_read_to_its_end(pipeline: LatentDiffusionPipeline) -> None:
    """In chunks; the negative prompt is filled up to as many."""
    long = "red " * 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference(generate(pipeline, long + "boat").images, generate(pipeline, long + "apple").images) > 1
    assert pipeline.encode_prompts([long + "boat", ""]).shape == (2, 2 * 77, 16)


def test_saving_leaves_no_other_files(pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    once = sorted(str(path) for path in tmp_path.rglob("*"))
    pipeline.save_pretrained(tmp_path)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == once
    assert "model_index.json" in os.listdir(tmp_path)


def test_the_words_of_diffusers_are_understood(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "p")
    with pytest.warns(UserWarning, match="ignored, as it means nothing here: safety_checker, use_safetensors"):
        pipeline = LatentDiffusionPipeline.from_pretrained(
            tmp_path / "p", torch_dtype=torch.float16, safety_checker=None, use_safetensors=True
        )
    assert pipeline.dtype == torch.float16
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "p", dtype="torch.bfloat16").dtype == torch.bfloat16
    for call in [("cpu", torch.float32), (torch.float32,), ("float32",)]:
        assert pipeline.to(torch.float16).to(*call).dtype == torch.float32
    assert pipeline.to(dtype="bfloat16").to("cpu").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'float8', must be one of float32, bfloat16, float16, as torch's"):
        pipeline.to(dtype="float8")
    with pytest.raises(ValueError, match="dtype is torch.int64, must be one of"):
        pipeline.to(torch.int64)
    with pytest.raises(ValueError, match="dtype is float32 and torch_dtype is float16: give one of them"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "p", dtype="float32", torch_dtype="float16")
    with pytest.raises(TypeError, match="unknown argument 'revision'; known are dtype, variant"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "p", revision="main")
