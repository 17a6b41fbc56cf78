"""A pipeline for the tests of this folder."""

import pytest
from tiny import tiny_pipeline

from latentdiff.pipeline import LatentDiffusionPipeline


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusionPipeline:
    """Shared: a test must leave it as it was."""
    return tiny_pipeline()
