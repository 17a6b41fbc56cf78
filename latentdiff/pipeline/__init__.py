"""The pipeline: prompt -> context -> latents -> pixels -> image."""

from latentdiff.pipeline.options import GenerationDefaults
from latentdiff.pipeline.pipeline import LatentDiffusionPipeline, NonFiniteError, PipelineOutput

__all__ = ["GenerationDefaults", "LatentDiffusionPipeline", "NonFiniteError", "PipelineOutput"]
