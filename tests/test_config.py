"""The configs: what is read, what is refused and how it is said, and that what is written reads back the same."""

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from stable_diffusion import write_sd15
from tiny import tiny_unet

from latentdiff.config import (
    AutoencoderKLConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Section,
    UNetConfig,
    UNetTrainingConfig,
    UNetValidationConfig,
    VAETrainingConfig,
    load_config,
    to_yaml,
    validated,
)
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.models.initial_model import with_initial_model

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = {"vae.yaml": VAETrainingConfig, "unet.yaml": UNetTrainingConfig}

VAE = """
data: {source: embedded, size: 16}
model: {block_out_channels: [8, 16], norm_num_groups: 4}
loss: {kl_weight: 1e-6}
optimizer: {lr: 1e-3}
train: {steps: 10, batch_size: 4}
validation: {every: 5}
output: {folder: run, checkpoint_every: 5}
"""
UNET = """
vae: run-vae
data: {source: embedded, size: 16}
model:
  block_out_channels: [8, 16]
  down_block_types: [CrossAttnDownBlock2D, DownBlock2D]
  up_block_types: [UpBlock2D, CrossAttnUpBlock2D]
  attention_head_dim: 2
  norm_num_groups: 4
text: {pretrained: null, config: {hidden_size: 16}}
diffusion: {}
optimizer: {lr: 1e-3}
train: {steps: 10, batch_size: 4}
validation: {every: 5, sample_every: 5, prompts: [a red apple]}
output: {folder: run, checkpoint_every: 5}
"""


@pytest.fixture
def vae_yaml(tmp_path):
    path = tmp_path / "vae.yaml"
    path.write_text(VAE, encoding="utf-8")
    return path


@pytest.fixture
def unet_yaml(tmp_path):
    path = tmp_path / "unet.yaml"
    path.write_text(UNET, encoding="utf-8")
    return path


def problems(kind: type[Section], path: Path, *overrides: str) -> list[str]:
    """The lines of the error that reading gives, without the file's name."""
    with pytest.raises(ValueError) as error:
        load_config(kind, path, overrides)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines), lines
    return [line.removeprefix(f"{path}: ") for line in lines]


# --- the recipes in configs/ ---

RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name in KINDS and path.parent.name != "reference")
REFERENCES = sorted((CONFIGS / "reference").glob("*.yaml"))
LAUNCHES = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def test_every_config_is_of_a_known_stage():
    """Or one of Accelerate's, which say how processes are started."""
    assert len(RECIPES) >= 2 and len(LAUNCHES) >= 1
    assert {*RECIPES, *REFERENCES, *LAUNCHES} == {*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.yml")}


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.name)
def test_accelerate_reads_the_launch_configs(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert config.mixed_precision == "no"  # train.precision is the one place for it
    blocks = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert set(blocks) <= {type(module).__name__ for module in tiny_unet().modules()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_recipe_states_what_it_chooses(path, tmp_path):
    """A valid config; a key with its default value, or that of the model it starts from, is left out."""

    def complete(values: dict[str, Any]) -> dict[str, Any]:
        if "init_from" not in values:
            return values
        assert values["init_from"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
        return with_initial_model(values | {"init_from": str(tmp_path)})

    write_sd15(tmp_path)
    kind = KINDS[path.name]
    config = load_config(kind, path, complete=complete)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved = yaml.safe_load(to_yaml(config))
    for section, values in written.items():
        for key in values if isinstance(values, dict) and section not in ("model", "text") else ():
            shortened = {**written, section: {name: value for name, value in values.items() if name != key}}
            try:
                without = yaml.safe_load(to_yaml(kind.model_validate(complete(shortened))))
            except ValueError:  # a key without a default, or one that others depend on
                continue
            assert without != resolved, f"{section}.{key} has its default value"


# --- reading ---


def test_values_and_defaults(vae_yaml):
    config = load_config(VAETrainingConfig, vae_yaml)
    assert config.optimizer.lr == 1e-3 and config.loss.kl_weight == 1e-6  # YAML 1.1 reads 1e-3 as a text
    assert config.model.block_out_channels == (8, 16) and config.model.downsampling == 2
    assert config.model.down_block_types == ("DownEncoderBlock2D",) * 2
    assert config.model.sample_size == 16 and config.data.shape == (16, 16)
    config = load_config(VAETrainingConfig, vae_yaml, ["data.size=[16, 32]"])
    assert config.model.sample_size == (16, 32) == config.data.shape
    assert load_config(VAETrainingConfig, vae_yaml, ["data.size=[32, 32]"]).data.size == 32
    config = load_config(VAETrainingConfig, vae_yaml)
    assert config.data.background == (255, 255, 255) and config.logging.every == 10
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=20", 20),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=2.5e-4", 2.5e-4),
        ("optimizer.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("optimizer.max_grad_norm=null", None),
        ("optimizer.max_grad_norm=", None),
        ("data.captions=none", "none"),
        ("data.caption_column='null'", "null"),
        ('data.source="a folder: with=signs"', "a folder: with=signs"),
        ("data.source=a=b", "a=b"),
        ("logging.every=3", 3),  # in a section that the file does not have
        ("train.channels_last=false", False),
        ("model.block_out_channels=[4, 8, 8]", (4, 8, 8)),
        ("train.micro_batch_size=auto", "auto"),
        ("train.micro_batch_size=2", 2),
        ("train.tf32=false", False),
        ("train.compile=blocks", "blocks"),
        ("train.deterministic=true", True),
        ("train.max_skipped_steps=0", 0),
        ("ema.decay=0", 0.0),
        ("ema.snapshot_every=5", 5),
        ("ema.snapshot_lengths=[0.1, 0.2, 0.02]", (0.1, 0.2, 0.02)),
        ("output.keep_every=10", 10),
        ("logging.log_with=[tensorboard, wandb]", ("tensorboard", "wandb")),
    ],
)
def test_override(vae_yaml, override, value):
    section, key = override.partition("=")[0].split(".")
    before = load_config(VAETrainingConfig, vae_yaml)
    config = load_config(VAETrainingConfig, vae_yaml, [override])
    assert getattr(getattr(config, section), key) == value
    assert getattr(getattr(before, section), key) != value
    # Nothing else changed.
    others = {name: getattr(config, name) for name in VAETrainingConfig.model_fields if name != section}
    assert others == {name: getattr(before, name) for name in others}


def test_later_override_wins(vae_yaml):
    assert load_config(VAETrainingConfig, vae_yaml, ["train.steps=2", "train.steps=3"]).train.steps == 3


def test_override_below_a_section(unet_yaml):
    overrides = ["text.config.hidden_size=32", "model.cross_attention_dim=32", "text.config.num_hidden_layers=1"]
    config = load_config(UNetTrainingConfig, unet_yaml, overrides)
    assert config.text.config == {"hidden_size": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override 'train.steps' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("train.steps.x=3", "override 'train.steps.x=3': 'steps' is a value, not a section"),
        ("train.steps=[1", "override 'train.steps=[1': '[1' is not a YAML value"),
    ],
)
def test_bad_override(vae_yaml, override, message):
    with pytest.raises(ValueError) as error:
        load_config(VAETrainingConfig, vae_yaml, [override])
    assert str(error.value) == message


def test_file_that_is_no_config(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(ValueError, match=r"^config .*c\.yaml does not exist$"):
        load_config(VAETrainingConfig, path)
    for content in (b"data: [1, 2", b"a: b: c", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^config .*c\.yaml is not YAML: [^\n]*$"):
            load_config(VAETrainingConfig, path)
    bomb = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairwise("abcdefghi")]
    for content, reason in (
        ("a: " + "[" * 3000 + "]" * 3000, "is not YAML: it is nested too deeply"),
        ("\n".join(bomb), "is not YAML: its aliases repeat too much"),
        ("a: 2026-99-99", "is not YAML: month must be in 1..12"),
        ("a: " + "1" * 200_000, "has 200,003 bytes, must have at most 200,000"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"^config .*c\.yaml {reason}$"):
            load_config(VAETrainingConfig, path)
    for content in ("", "3", "- a\n- b", "text"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"^config .*c\.yaml must hold sections such as data, .*, not [^\n]*$"):
            load_config(VAETrainingConfig, path)


def test_yaml_tags_are_not_run(vae_yaml, tmp_path):
    """Only plain data is read: a tag that would call a function is refused, in a file and in an override."""
    made = tmp_path / "made"
    tag = f"!!python/object/apply:os.mkdir ['{made}']"
    with pytest.raises(ValueError, match="is not a YAML value"):
        load_config(VAETrainingConfig, vae_yaml, [f"data.source={tag}"])
    vae_yaml.write_text(VAE.replace("source: embedded", f"source: {tag}"), encoding="utf-8")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(VAETrainingConfig, vae_yaml)
    assert not made.exists()


# --- problems, a line each ---


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stepps=3", "unknown key train.stepps; did you mean steps?"),
        ("datta.size=3", "unknown key datta; did you mean data?"),
        ("model.block_out_chanels=[8]", "unknown key model.block_out_chanels; did you mean block_out_channels?"),
        ("ema.foo=1", "unknown key ema.foo; known keys: decay, snapshot_every, snapshot_lengths"),
        ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
        ("train.lr=1", "unknown key train.lr; did you mean optimizer.lr?"),
        ("train.learning_rate=1", "unknown key train.learning_rate; did you mean optimizer.lr?"),
        ("check_point_every=1", "unknown key check_point_every; did you mean output.checkpoint_every?"),
        ("train.batch-size=1", "unknown key train.batch-size; did you mean batch_size?"),
        ("ema.\x1b[31m=1", r"unknown key ema.'\x1b[31m'; known keys: decay, snapshot_every, snapshot_lengths"),
        (
            f"ema.decay={'x' * 5000}",
            "ema.decay: Input should be a valid number, unable to parse string as a number, got "
            f"'{'x' * 47}...{'x' * 48}'",
        ),
        (f"ema.decay={[1] * 9}", "ema.decay: Input should be a valid number, got [1, 1, 1, 1, 1, 1, ...]"),
        ("data.num_workers=1000000", "data.num_workers: Input should be less than or equal to 1024, got 1000000"),
        ("data.size=16385", "data.size: Input should be less than or equal to 16384, got 16385"),
        ("data.size=[16, 0]", "data.size.1: Input should be greater than or equal to 1, got 0"),
        ("data.size=[16]", "key data.size.1 is missing"),
        ("data.size=[16, 17]", "data.size [16, 17] is not divisible by 2, the model's downsampling"),
        (
            "data={source: a, size: [16, 32], buckets: true}",
            "data.size is [16, 32], must be one number where buckets is true",
        ),
        ("model.sample_size=8", "model.sample_size is 8, must be data.size 16, or left out"),
        (
            "train.steps=abc",
            "train.steps: Input should be a valid integer, got 'abc'",
        ),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1, got 0"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, got -1"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number, got inf"),
        ("data.flip=1.5", "data.flip: Input should be less than or equal to 1, got 1.5"),
        ("data.crop=middle", "data.crop: Input should be 'center' or 'random', got 'middle'"),
        ("data.background=[1, 2, 256]", "data.background.2: Input should be less than or equal to 255, got 256"),
        ("data.background=[1, 2]", "key data.background.2 is missing"),
        ("ema.decay=1.0", "ema.decay: Input should be less than 1, got 1.0"),
        ("ema.snapshot_every=0", "ema.snapshot_every: Input should be greater than or equal to 1, got 0"),
        ("ema.snapshot_lengths=[0.1, 0.3]", "ema.snapshot_lengths.1: Input should be less than 0.28, got 0.3"),
        ("ema.snapshot_lengths=[0.1]", "ema.snapshot_lengths [0.1] must have at least two different lengths"),
        (
            "ema.snapshot_lengths=[0.1, 0.1]",
            "ema.snapshot_lengths [0.1, 0.1] must have at least two different lengths",
        ),
        (
            "train.max_skipped_steps=-1",
            "train.max_skipped_steps: Input should be greater than or equal to 0, got -1",
        ),
        (
            "output.publish=best",
            "output.publish is best, which needs a validation set: set data.holdout or data.validation_split, or leave "
            "it null",
        ),
        ("output.keep_every=0", "output.keep_every: Input should be greater than or equal to 1, got 0"),
        ("logging.log_with=[mlflow]", "logging.log_with.0: Input should be 'tensorboard' or 'wandb', got 'mlflow'"),
        ("optimizer.lr=null", "optimizer.lr_schedule constant takes lr, and no lr_stages"),
        ("optimizer.lr_stages=[[0.1, 5]]", "optimizer.lr_schedule constant takes lr, and no lr_stages"),
        (
            "optimizer.lr_schedule=staged",
            "optimizer.lr_schedule staged takes lr_stages, a list of [lr, steps], and no lr",
        ),
        (f"train.seed={2**63}", f"train.seed: Input should be less than {2**63}, got {2**63}"),
        ("logging=3", "logging: must be a section with the keys every, progress, log_with, got 3"),
        ("data.size=17", "data.size 17 is not divisible by 2, the model's downsampling"),
        ("model.in_channels=1", "model.in_channels 1 and model.out_channels 3 differ"),
        ("model.norm_num_groups=3", "model.block_out_channels has 8, which norm_num_groups 3 does not divide"),
        ("model.act_fn=relu", "model: act_fn is 'relu', but only 'silu' is supported"),
        ("model.latents_mean=[0.1]", "model: latents_mean is [0.1], but only None is supported"),
        (
            "model.up_block_types=[UpDecoderBlock2D]",
            "model.up_block_types has 1 entries, block_out_channels has 2",
        ),
    ],
)
def test_problem_of_stage_1(vae_yaml, override, line):
    assert problems(VAETrainingConfig, vae_yaml, "data.holdout=0", override) == [line]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "text.pretrained=folder",
            "text: give either pretrained (a folder or hub id) or config (of one to train), not both",
        ),
        ("text.config=null", "text: give either pretrained (a folder or hub id) or config (of one to train), not both"),
        (
            "model.resnet_time_scale_shift=scale_shift",
            "model: resnet_time_scale_shift is 'scale_shift', but only 'default' is supported",
        ),
        ("model.magic=1", "unknown key model.magic; known keys: sample_size"),
        (
            "model.down_block_types=[CrossAttnDownBlock2D, AttnDownBlock2D]",
            "model.down_block_types.1: Input should be 'CrossAttnDownBlock2D', 'LinearAttnDownBlock2D' or "
            "'DownBlock2D', got 'AttnDownBlock2D'",
        ),
        (
            "model.attention_head_dim=[2]",
            "model.attention_head_dim has 1 entries, block_out_channels has 2",
        ),
        ("model.attention_head_dim=3", "model.block_out_channels has 8, which 3 attention heads do not divide"),
        ("validation.prompts=[]", "validation.prompts: List should have at least 1 item after validation, not 0"),
        (
            "validation.sigmas=lu",
            "validation.sigmas: Input should be 'schedule', 'karras', 'exponential' or 'beta', got 'lu'",
        ),
        (
            "diffusion.num_train_timesteps=20",
            "validation.num_inference_steps 50 is more than diffusion.num_train_timesteps 20",
        ),
        ("train.caption_dropout=1.5", "train.caption_dropout: must be a fraction in 0 .. 1, or two of them"),
        ("train.caption_dropout=[1.0]", "train.caption_dropout: must be a fraction in 0 .. 1, or two of them"),
        ("train.caption_dropout=[1, 0.5, 0]", "train.caption_dropout: must be a fraction in 0 .. 1, or two of"),
        ("train.caption_dropout=much", "train.caption_dropout: must be a fraction in 0 .. 1, or two of them"),
        (
            "train.caption_dropout=0",
            "validation.guidance_scale is 5.0, which needs the unconditional prompt, but it is",
        ),
        ("train.caption_dropout=[0, 0]", "validation.guidance_scale is 5.0, which needs the unconditional prompt"),
        (
            "train.caption_dropout=1",
            "validation.guidance_scale is 5.0, which needs captions, but train",
        ),
        ("train.offset_noise=true", "train.offset_noise: must be a number, got True"),
        ("data.captions=none", "validation.guidance_scale is 5.0, must be 1 without captions (data.captions)"),
        ("text.config={max_position_embeddings: 2}", "text: config.max_position_embeddings is 2, must be at least 3"),
        ("data.repeat=0", "data.repeat: Input should be greater than or equal to 1, got 0"),
        ("loss.loss_type=l2", "loss.loss_type: Input should be 'mse', 'l1' or 'huber', got 'l2'"),
        ("loss={huber_delta: 0}", "loss.huber_delta is 0.0, must be above 0"),
    ],
)
def test_problem_of_stage_2(unet_yaml, override, line):
    (found,) = problems(UNetTrainingConfig, unet_yaml, override)
    assert found.startswith(line)


def test_pure_noise_must_have_weight(unet_yaml):
    """min-SNR and p2 weights are 0 at an SNR of 0, where sampling begins with a terminal SNR of zero."""
    overrides = ["diffusion.rescale_betas_zero_snr=true", "diffusion.prediction_type=v_prediction"]
    for weighting in ("min_snr", "p2"):
        with pytest.raises(
            ValueError, match=rf"loss.weighting {weighting} gives pure noise no weight.*must be constant"
        ):
            load_config(UNetTrainingConfig, unet_yaml, [*overrides, f"loss.weighting={weighting}"])
    assert load_config(UNetTrainingConfig, unet_yaml, overrides).loss.weighting == "constant"


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("[1, 0.1]", (1.0, 0.1)), ("[1.0, 0.1]", (1.0, 0.1))])
def test_caption_dropout_is_one_fraction_or_two(unet_yaml, text, value):
    config = load_config(UNetTrainingConfig, unet_yaml, [f"train.caption_dropout={text}"])
    assert config.train.caption_dropout == value
    assert validated(UNetTrainingConfig, yaml.safe_load(to_yaml(config)), "again") == config


STAGED = ["optimizer.lr=null", "optimizer.lr_schedule=staged"]


def test_stages_of_the_learning_rate(vae_yaml):
    config = load_config(VAETrainingConfig, vae_yaml, [*STAGED, "optimizer.lr_stages=[[1e-3, 5], [2e-4, 1]]"])
    assert config.optimizer.lr_stages == ((1e-3, 5), (2e-4, 1)) and config.optimizer.lr is None
    for schedule in ("linear", "cosine"):
        (line,) = problems(
            VAETrainingConfig, vae_yaml, f"optimizer.lr_schedule={schedule}", "optimizer.lr_stages=[[0.1, 5]]"
        )
        assert line == f"optimizer.lr_schedule {schedule} takes lr, and no lr_stages"
    (line,) = problems(VAETrainingConfig, vae_yaml, *STAGED)
    assert line == "optimizer.lr_schedule staged takes lr_stages, a list of [lr, steps], and no lr"


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("[]", "optimizer.lr_stages: List should have at least 1 item after validation, not 0, got []"),
        ("[[0.1, 5], [0, 3]]", "optimizer.lr_stages.1.0: Input should be greater than 0, got 0"),
        ("[[0.1, 5], [0.1, 0]]", "optimizer.lr_stages.1.1: Input should be greater than or equal to 1, got 0"),
        ("[[0.1, 5], [0.1, 2.5]]", "optimizer.lr_stages.1.1: Input should be a valid integer, got 2.5"),
        ("[[0.1, 5], [0.1]]", "key optimizer.lr_stages.1.1 is missing"),
    ],
)
def test_wrong_stages_of_the_learning_rate(vae_yaml, stages, line):
    assert problems(VAETrainingConfig, vae_yaml, *STAGED, f"optimizer.lr_stages={stages}") == [line]


def test_text_encoder_may_be_frozen(unet_yaml):
    config = load_config(UNetTrainingConfig, unet_yaml, ["text.pretrained=folder", "text.config=null"])
    assert config.text.pretrained == "folder" and config.text.config is None


def test_all_problems_are_reported_at_once(vae_yaml):
    vae_yaml.write_text(VAE.replace("train: {steps: 10, batch_size: 4}", ""), encoding="utf-8")
    overrides = ["optimizer.lr=-1", "data.sise=3", "data.size=x", "output={folder: run}"]
    assert sorted(problems(VAETrainingConfig, vae_yaml, *overrides)) == [
        "data.size: Input should be a valid integer, got 'x'",
        "key output.checkpoint_every is missing",
        "key train is missing",
        "optimizer.lr: Input should be greater than 0, got -1",
        "unknown key data.sise; did you mean size?",
    ]


def test_config_of_the_other_stage_is_one_line(vae_yaml, unet_yaml):
    with pytest.raises(
        ValueError, match=r"^config .* is one of stage 1 \(it has the key loss.kl_weight\): give it to "
    ):
        load_config(UNetTrainingConfig, vae_yaml)
    with pytest.raises(ValueError, match=r"^config .* is one of stage 2 \(it has the key vae\): give it to "):
        load_config(VAETrainingConfig, unet_yaml)


def test_key_that_is_no_text(vae_yaml):
    vae_yaml.write_text(VAE.replace("norm_num_groups: 4", "norm_num_groups: 4, 7: x"), encoding="utf-8")
    assert problems(VAETrainingConfig, vae_yaml) == ["model.7: Keys should be strings, got 7"]


def test_samplers_are_those_that_exist():
    for name in SAMPLERS:
        assert UNetValidationConfig(every=1, sample_every=1, prompts=("a",), sampler=name).sampler == name
    with pytest.raises(ValueError, match="unknown sampler 'eule', must be one of ddpm, ddim"):
        UNetValidationConfig(every=1, sample_every=1, prompts=("a",), sampler="eule")


# --- writing ---


def test_saved_config_reads_back_equal(vae_yaml, unet_yaml, tmp_path):
    overrides = {
        VAETrainingConfig: [
            "optimizer.betas=[0.1, 0.3]",
            "data.source='Größe: \"x\"'",
            "optimizer.lr=1.0000000000001e-7",
        ],
        UNetTrainingConfig: ["model.attention_head_dim=[2, 4]", "validation.prompts=['yes', '1', 'a: b', '']"],
    }
    for kind, path in [(VAETrainingConfig, vae_yaml), (UNetTrainingConfig, unet_yaml)]:
        config = load_config(kind, path, overrides[kind])
        saved = tmp_path / "saved.yaml"
        saved.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(kind, saved) == config
        written = yaml.safe_load(saved.read_text(encoding="utf-8"))
        assert written.keys() == kind.model_fields.keys()  # every key, also those that were left out
        assert written["data"].keys() == DataConfig.model_fields.keys()
        assert written["optimizer"].keys() == OptimizerConfig.model_fields.keys()


# --- diffusers' config.json ---

MODELS = [
    (
        AutoencoderKLConfig(
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.25,
            mid_block_add_attention=False,
        ),
        diffusers.AutoencoderKL,
    ),
    (
        UNetConfig(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
        ),
        diffusers.UNet2DConditionModel,
    ),
]


@pytest.mark.parametrize(("config", "reference"), MODELS, ids=["AutoencoderKL", "UNet"])
def test_diffusers_config(config: ModelConfig, reference: type):
    written = config.to_diffusers()
    assert type(config).from_diffusers(written, "config.json") == config
    # diffusers builds the model from it and keeps every value.
    built = reference.from_config(written).config
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in built.items()}
    assert {key: plain[key] for key in written if not key.startswith("_")} == {
        key: value for key, value in written.items() if not key.startswith("_")
    }
    # What is not written is off in diffusers, so that the file describes the model whole.
    parameters = inspect.signature(reference.__init__).parameters
    unwritten = [key for key in parameters if key not in written and key != "self"]
    assert [key for key in unwritten if parameters[key].default not in (None, False)] == []
    # And diffusers' own file of it, with all its keys, reads as the same config.
    assert type(config).from_diffusers(dict(built), "config.json") == config


def test_diffusers_values_that_are_not_built_are_named():
    config, _ = MODELS[0]
    for change, message in [
        ({"act_fn": "relu"}, "place: act_fn is 'relu', but only 'silu' is supported"),
        ({"norm_type": "spatial"}, "place: unknown key norm_type; known keys: sample_size"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "place: down_block_types.0: Input should be"),
    ]:
        with pytest.raises(ValueError) as error:
            AutoencoderKLConfig.from_diffusers(config.to_diffusers() | change, "place")
        assert str(error.value).startswith(message)
    # Keys without an effect are accepted: files of other diffusers versions have some.
    quiet = config.to_diffusers() | {"some_new_key": None, "another": False, "_name_or_path": "x"}
    assert AutoencoderKLConfig.from_diffusers(quiet, "place") == config


def test_block_types_may_be_left_out_and_defaults_are_diffusers_own():
    config = validated(AutoencoderKLConfig, {"block_out_channels": [32, 32]}, "place")
    assert config.down_block_types == ("DownEncoderBlock2D",) * 2
    assert config.up_block_types == ("UpDecoderBlock2D",) * 2
    for kind, reference in [
        (AutoencoderKLConfig, diffusers.AutoencoderKL),
        (UNetConfig, diffusers.UNet2DConditionModel),
    ]:
        parameters = inspect.signature(reference.__init__).parameters
        defaults = {key: field.default for key, field in kind.model_fields.items() if not field.is_required()}
        assert defaults == {key: parameters[key].default for key in defaults}
        assert kind.fixed == {key: parameters[key].default for key in kind.fixed}


def test_what_follows_from_other_keys_need_not_be_given(unet_yaml):
    """The text encoder's width is the context's; in pixel space the UNet has the images' size and three channels."""
    config = load_config(UNetTrainingConfig, unet_yaml, ["text.config.hidden_size=48"])
    assert config.model.cross_attention_dim == 48 and config.model.sample_size is None
    pixels = load_config(UNetTrainingConfig, unet_yaml, ["vae=null", "data.size=[32, 64]"])
    assert (pixels.model.in_channels, pixels.model.out_channels, pixels.model.sample_size) == (3, 3, (32, 64))
    grey = load_config(UNetTrainingConfig, unet_yaml, ["vae=null", "model.in_channels=1", "model.out_channels=1"])
    assert grey.model.in_channels == grey.model.out_channels == 1
    assert problems(UNetTrainingConfig, unet_yaml, "model.cross_attention_dim=40", "text.config.hidden_size=48") == [
        "text.config.hidden_size 48 is not model.cross_attention_dim 40"
    ]


@pytest.mark.parametrize(
    ("holdout", "images", "held"), [(0.1, 1, 0), (0.1, 2, 1), (0.1, 30, 3), (0.25, 10, 2), (4, 3, 4), (0, 9, 0)]
)
def test_how_many_images_are_held_out(holdout, images, held):
    assert DataConfig(source="a", size=8, holdout=holdout).held_out_of(images) == held
    assert DataConfig(source="a", size=8, holdout=holdout, validation_split="test").held_out_of(images) == 0
