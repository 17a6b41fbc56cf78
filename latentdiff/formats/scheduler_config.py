"""scheduler_config.json of a diffusers folder: a noise schedule, and the sampler that its scheduler class means."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from latentdiff.diffusion.samplers import SAMPLERS, Sampler, get_sampler
from latentdiff.diffusion.schedule import NoiseSchedule, TimestepSpacing
from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.printable import shortened

# diffusers scheduler classes whose configs can be read, with the timestep_spacing of each if the key is missing.
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
# Classes whose default is Stable Diffusion's beta range; the default of all others is DDPM's.
_STABLE_DIFFUSION_BETAS = ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")
_COSINE = "squaredcos_cap_v2"  # diffusers' name for beta_schedule cosine
_FLAGS: dict[Sigmas, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
# Config keys that change the samples, with the values that the samplers here implement.
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
# diffusers classes without Karras, exponential and beta sigmas.
_NO_SIGMAS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler")
# Classes without zero terminal SNR.
_NO_ZERO_SNR = (
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)
# Classes that can clip the predicted image.
_CLIPPING = ("DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler")


def read_scheduler_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, Sigmas]:
    """The schedule, the sampler's name and the spacing of its noise levels.

    Warns if the config asks for an unsupported variant of the sampler, and uses the nearest one.
    Raises ValueError as `read_schedule` does.
    """
    schedule = read_schedule(config)
    name = config["_class_name"]
    known = [sampler for sampler in SAMPLERS.values() if sampler.diffusers_class == name]
    assert known, name
    # The most specific sampler that fits the config; if none fits, the first one, which has the fewest keys.
    fitting = [s for s in known if all(config.get(key) == value for key, value in s.diffusers_keys.items())]
    sampler = max(fitting, key=lambda s: len(s.diffusers_keys)) if fitting else known[0]

    unsupported = {
        key: config[key] for key, values in _SUPPORTED.items() if key in config and config[key] not in values
    }
    unsupported |= {key: config.get(key) for key, value in sampler.diffusers_keys.items() if config.get(key) != value}
    order = _solver_order(sampler)
    if order is not None and config.get("solver_order", order) != order:
        unsupported["solver_order"] = config["solver_order"]
    if unsupported:
        listed = ", ".join(f"{key} {shortened(value)}" for key, value in unsupported.items())
        warnings.warn(f"{name} with {listed} is not supported; sampling with {sampler.name} instead", stacklevel=2)
    sigmas: list[Sigmas] = [name for name, flag in _FLAGS.items() if config.get(flag)]
    return schedule, sampler.name, sigmas[0] if sigmas else "schedule"


def read_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a diffusers scheduler_config.json; missing keys get the defaults of the class that it names.

    clip_sample is ignored: pixel space is clipped, latents never are (diffusers' latent pipelines set it to false).
    Raises ValueError, naming the key, for an unknown _class_name, for trained_betas and thresholding, and for values
    that NoiseSchedule rejects.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _DEFAULT_SPACING:
        raise ValueError(f"_class_name is {shortened(name)}, must be one of {', '.join(_DEFAULT_SPACING)}")
    for key in ("trained_betas", "thresholding"):
        if config.get(key) not in (None, False):
            raise ValueError(f"{key} is {shortened(config[key])} in the {name} config, only null or false is supported")
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


def _solver_order(sampler: Sampler) -> int | None:
    """The solver_order of this sampler's scheduler; None if its class has no such key."""
    if sampler.grid != "dpmsolver":
        return None
    return sampler.diffusers_keys.get("solver_order", 2)


def write_scheduler_config(
    schedule: NoiseSchedule, sampler: str, sigmas: Sigmas = "schedule", clip_sample: bool = False
) -> dict[str, Any]:
    """The scheduler_config.json from which diffusers builds the sampler's scheduler, with every key written out.

    clip_sample: whether the predicted x0 is clamped to [-1, 1]: right for pixels, wrong for latents.
    Warns if the images of diffusers' class will differ, because it lacks the sigmas, zero terminal SNR or clipping.
    """
    chosen = get_sampler(sampler)
    name, ignored = chosen.diffusers_class, []
    if sigmas != "schedule" and name in _NO_SIGMAS:
        ignored.append(f"{sigmas} sigmas")
    if schedule.rescale_betas_zero_snr and name in _NO_ZERO_SNR:
        ignored.append("zero terminal SNR")
    if clip_sample and name not in _CLIPPING:
        ignored.append("clipping of the predicted image")
    if ignored:
        warnings.warn(
            f"diffusers' {name} does not support {' and '.join(ignored)}: its images will differ from those of "
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
    if _solver_order(chosen) is not None:
        config.setdefault("solver_order", _solver_order(chosen))
    if sigmas != "schedule":
        config[_FLAGS[sigmas]] = True
    return config
