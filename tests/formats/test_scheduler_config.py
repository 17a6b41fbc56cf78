"""scheduler_config.json: schedules and samplers read and written, against diffusers' own scheduler classes."""

import dataclasses
import inspect
import warnings

import diffusers
import pytest
import torch
from tiny import SD1_SCHEDULER

from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.scheduler_config import read_schedule, read_scheduler_config, write_scheduler_config

SCHEDULES = [
    NoiseSchedule(steps_offset=0),
    NoiseSchedule(),
    NoiseSchedule(beta_schedule="cosine", prediction_type="v_prediction", timestep_spacing="linspace"),
    NoiseSchedule(
        beta_schedule="linear",
        beta_start=0.0002,
        beta_end=0.03,
        num_train_timesteps=500,
        prediction_type="sample",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    ),
    NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduler_config_round_trip(schedule):
    assert read_schedule(write_scheduler_config(schedule, "ddim")) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusers_reads_our_config(schedule, tmp_path):
    config = write_scheduler_config(schedule, "ddim")
    reference = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-6, rtol=0)
    assert float(reference.final_alpha_cumprod) == pytest.approx(schedule.final_alpha_cumprod, abs=1e-6)
    # Every key of the class is written and none is unknown to it: nothing is left to diffusers' defaults.
    assert set(config) - {"_class_name"} == set(inspect.signature(diffusers.DDIMScheduler).parameters)
    # And back, through the file that diffusers writes.
    reference.save_pretrained(tmp_path)
    assert read_schedule(diffusers.DDIMScheduler.load_config(tmp_path)) == schedule


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy
@pytest.mark.parametrize(
    "name",
    "DDIM DDPM PNDM DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete "
    "HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete UniPCMultistep".split(),
)
def test_missing_keys_get_the_class_defaults(name):
    """A config with nothing but the class name is that class built without arguments."""
    reference = getattr(diffusers, f"{name}Scheduler")()
    schedule = read_schedule({"_class_name": f"{name}Scheduler"})
    for field in dataclasses.fields(NoiseSchedule):
        if field.name in reference.config:
            assert getattr(schedule, field.name) == reference.config[field.name], field.name
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-6, rtol=0)


def test_stable_diffusion_config():
    """The file that comes with Stable Diffusion 1.5."""
    config = SD1_SCHEDULER | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False}
    expected = NoiseSchedule(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    assert read_schedule(config) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trained_betas", [0.1, 0.2]),
        ("thresholding", True),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("_class_name", []),
    ],
)
def test_unsupported_configs_name_the_key(key, value):
    with pytest.raises(ValueError, match=key) as error:
        read_schedule({"_class_name": "DDPMScheduler", key: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "rescale_betas_zero_snr is true with prediction_type epsilon, must be with v_prediction or sample"),
        ({"prediction_type": "sample", "num_train_timesteps": 1}, "needs num_train_timesteps of at least 2, it is 1"),
    ],
)
def test_bad_zero_terminal_snr_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        read_schedule({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True} | fields)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_sampler_and_sigmas_survive_a_round_trip(name):
    """Also through the config of the scheduler that diffusers builds from it."""
    schedule = NoiseSchedule(steps_offset=0)
    for sigmas in ("schedule", "karras", "exponential", "beta"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the class may lack the sigmas
            config = write_scheduler_config(schedule, name, sigmas)
        assert read_scheduler_config(config) == (schedule, name, sigmas)
    theirs = getattr(diffusers, SAMPLERS[name].diffusers_class).from_config(write_scheduler_config(schedule, name))
    config = dict(theirs.config) | {"_class_name": type(theirs).__name__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DPMSolverSinglestepScheduler writes lower_order_final false
        assert read_scheduler_config(config)[1:] == (name, "schedule")


def test_clip_sample_is_written_and_ignored_when_read():
    schedule = NoiseSchedule()
    for clip_sample in (True, False):
        config = write_scheduler_config(schedule, "ddim", clip_sample=clip_sample)
        assert config["clip_sample"] is clip_sample and config["clip_sample_range"] == 1.0
        assert read_schedule(config) == schedule


def test_unsupported_features_of_a_diffusers_class_are_named():
    zero_snr = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.warns(UserWarning, match="DDIMScheduler does not support karras sigmas: its images will differ"):
        write_scheduler_config(NoiseSchedule(), "ddim", "karras")
    with pytest.warns(UserWarning, match="does not support zero terminal SNR and clipping of the predicted image"):
        write_scheduler_config(zero_snr, "lms", clip_sample=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_scheduler_config(zero_snr, "ddim", clip_sample=True)


def test_unsupported_variant_of_a_sampler_is_named():
    config = write_scheduler_config(NoiseSchedule(), "dpm++2m") | {"solver_type": "heun", "solver_order": 3}
    with pytest.warns(UserWarning, match="with solver_type 'heun', solver_order 3 is not supported; .* dpm") as caught:
        assert read_scheduler_config(config)[1] == "dpm++2m"
    assert len(caught) == 1
