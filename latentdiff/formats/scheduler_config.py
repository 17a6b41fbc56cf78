"""scheduler_config.json of a diffusers folder: a noise schedule, and the sampler that its class stands for."""

import warnings
from collections.abc import Mapping
from typing import Any

from latentdiff.diffusion import NoiseSchedule
from latentdiff.samplers import SAMPLERS, Sampler, get_sampler
from latentdiff.spacing import Sigmas

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
    "original_inference_steps": (50,),
    "timestep_scaling": (10.0,),
}
# Diffusers classes that do not know sigmas laid out by noise, a terminal SNR of zero, or to clip.
_NO_SIGMAS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")
_NO_ZERO_SNR = (
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)
_CLIPPING = ("DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler")


def read_scheduler_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, Sigmas]:
    """The schedule, the sampler's name and how its noise levels are laid out.

    Warns where the config asks for a variant of the sampler that is not here, and the nearest one is taken.
    Raises ValueError as NoiseSchedule.from_scheduler_config.
    """
    schedule = NoiseSchedule.from_scheduler_config(config)
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


def _orders(sampler: Sampler) -> int | None:
    """The solver_order that a scheduler of this sampler has, if its class knows the key."""
    if sampler.layout != "interval":
        return None
    return sampler.diffusers_keys.get("solver_order", 2)


def write_scheduler_config(schedule: NoiseSchedule, sampler: str, sigmas: Sigmas = "schedule") -> dict[str, Any]:
    """The scheduler_config.json from which diffusers makes the scheduler of that sampler.

    Warns where diffusers' class does not know what the schedule or the sigmas ask for, and so draws other pictures.
    """
    chosen = get_sampler(sampler)
    name, ignored = chosen.diffusers_class, []
    if sigmas != "schedule" and name in _NO_SIGMAS:
        ignored.append(f"{sigmas} sigmas")
    if schedule.rescale_betas_zero_snr and name in _NO_ZERO_SNR:
        ignored.append("a terminal SNR of zero")
    if schedule.clip_sample and name not in _CLIPPING:
        ignored.append("clipping of the predicted picture")
    if ignored:
        warnings.warn(
            f"diffusers' {name} does not know {' and '.join(ignored)}: its pictures will differ from those of "
            f"{sampler} here",
            stacklevel=2,
        )
    config = schedule.to_scheduler_config() | {"_class_name": chosen.diffusers_class} | dict(chosen.diffusers_keys)
    if _orders(chosen) is not None:
        config.setdefault("solver_order", _orders(chosen))
    if sigmas != "schedule":
        config[_FLAGS[sigmas]] = True
    return config
