"""scheduler_config.json of a diffusers folder: a noise schedule, and the sampler that its class stands for."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from latentdiff.diffusion.samplers import SAMPLERS, Sampler, get_sampler
from latentdiff.diffusion.schedule import NoiseSchedule, TimestepSpacing
from latentdiff.diffusion.timesteps import Sigmas

# diffusers scheduler classes whose configs can be read, by the timestep_spacing each one takes when the key is missing.
_DEFAULT_SPACING: dict[str, TimestepSpacing] = {
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "PNDMScheduler": "leading",
    "DEISMultistepScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "DPMSolverSinglestepScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "EulerDiscreteScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
    "KDPM2AncestralDiscreteScheduler": "linspace",
    "KDPM2DiscreteScheduler": "linspace",
    "LMSDiscreteScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
}
# The classes that default to Stable Diffusion's beta range; every other one defaults to DDPM's.
_STABLE_DIFFUSION_BETAS = ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")
_COSINE = "squaredcos_cap_v2"  # diffusers' name for beta_schedule cosine
_FLAGS: dict[Sigmas, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
# What a config may say that changes the samples, and the values that the samplers here stand for.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "logrho", "bh2"),
    "final_sigmas_type": ("zero",),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", None),
    "predict_x0": (True,),
    "euler_at_final": (False,),
    "lower_order_final": (True,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "disable_corrector": ([], None),
}
# diffusers classes without Karras (or exponential, beta) sigmas, without a terminal SNR of zero, and those that clip.
_NO_SIGMAS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler")
_NO_ZERO_SNR = (
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)
_CLIPPING = ("DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler")


def read_scheduler_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, Sigmas]:
    """The schedule, the sampler's name and how its noise levels are laid out.

    Warns where the config asks for an unsupported variant of the sampler, and takes the nearest one.
    Raises ValueError as `read_schedule`.
    """
    schedule = read_schedule(config)
    name = config["_class_name"]
    known = [sampler for sampler in SAMPLERS.values() if sampler.diffusers_class == name]
    assert known, name
    # The one that asks for most of what the config says; the first one, which asks for least, if none fits.
    fitting = [s for s in known if all(config.get(key) == value for key, value in s.diffusers_keys.items())]
    sampler = max(fitting, key=lambda s: len(s.diffusers_keys)) if fitting else known[0]

    odd = {key: config[key] for key, values in _SUPPORTED.items() if key in config and config[key] not in values}
    odd |= {key: config.get(key) for key, value in sampler.diffusers_keys.items() if config.get(key) != value}
    order = _orders(sampler)
    if order is not None and config.get("solver_order", order) != order:
        odd["solver_order"] = config["solver_order"]
    if odd:
        said = ", ".join(f"{key} {value!r}" for key, value in odd.items())
        warnings.warn(f"{name} with {said} is not supported; sampling with {sampler.name} instead", stacklevel=2)
    wanted = [sigmas for sigmas, flag in _FLAGS.items() if config.get(flag)]
    return schedule, sampler.name, wanted[0] if wanted else "schedule"


def read_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a diffusers scheduler_config.json; missing keys take the defaults of the class it names.

    clip_sample is ignored: whether there is an autoencoder decides (diffusers' own latent pipelines force it to false).
    Raises ValueError naming the key for an unknown _class_name and for what would change the schedule: trained_betas,
    thresholding, and the values that NoiseSchedule itself refuses.
    """
    name = config.get("_class_name")
    if name not in _DEFAULT_SPACING:
        raise ValueError(f"_class_name is {name!r}, must be one of {', '.join(_DEFAULT_SPACING)}")
    for key in ("trained_betas", "thresholding"):
        if config.get(key) not in (None, False):
            raise ValueError(f"{key} is {config[key]!r} in the {name} config, only null or false is supported")
    stable_diffusion = name in _STABLE_DIFFUSION_BETAS
    values = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 0.00085 if stable_diffusion else 0.0001,
        "beta_end": 0.012 if stable_diffusion else 0.02,
        "prediction_type": "epsilon",
        "timestep_spacing": _DEFAULT_SPACING[name],
        "steps_offset": 0,
        "set_alpha_to_one": name != "PNDMScheduler",
        "rescale_betas_zero_snr": False,
    }
    values |= {key: config[key] for key in values if key in config}
    if values["beta_schedule"] == _COSINE:
        values["beta_schedule"] = "cosine"
    return NoiseSchedule(**values)


def _orders(sampler: Sampler) -> int | None:
    """The solver_order that a scheduler of this sampler has, if its class knows the key."""
    if sampler.layout != "interval":
        return None
    return sampler.diffusers_keys.get("solver_order", 2)


def write_scheduler_config(
    schedule: NoiseSchedule, sampler: str, sigmas: Sigmas = "schedule", clip_sample: bool = False
) -> dict[str, Any]:
    """The scheduler_config.json from which diffusers makes the scheduler of that sampler, every key written out.

    clip_sample: whether the predicted clean latents are clamped to [-1, 1]: right for pixels, wrong for latents.
    Warns where diffusers' class does not know what the schedule or the sigmas ask for, and so draws other images.
    """
    chosen = get_sampler(sampler)
    name, ignored = chosen.diffusers_class, []
    if sigmas != "schedule" and name in _NO_SIGMAS:
        ignored.append(f"{sigmas} sigmas")
    if schedule.rescale_betas_zero_snr and name in _NO_ZERO_SNR:
        ignored.append("a terminal SNR of zero")
    if clip_sample and name not in _CLIPPING:
        ignored.append("clipping of the predicted image")
    if ignored:
        warnings.warn(
            f"diffusers' {name} does not know {' and '.join(ignored)}: its images will differ from those of "
            f"{sampler} here",
            stacklevel=2,
        )
    config = asdict(schedule) | {
        "_class_name": chosen.diffusers_class,
        "beta_schedule": _COSINE if schedule.beta_schedule == "cosine" else schedule.beta_schedule,
        "clip_sample": clip_sample,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "thresholding": False,
        "trained_betas": None,
        **chosen.diffusers_keys,
    }
    if _orders(chosen) is not None:
        config.setdefault("solver_order", _orders(chosen))
    if sigmas != "schedule":
        config[_FLAGS[sigmas]] = True
    return config
