"""The names that `latentdiff` itself exports, imported on first use."""

import json
import subprocess
import sys

import pytest

import latentdiff


def test_every_public_name_is_importable():
    for name in latentdiff.__all__:
        assert getattr(latentdiff, name) is not None
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    assert latentdiff.UNet.__module__ == "latentdiff.models.unet"
    assert latentdiff.get_sampler("ddim") is latentdiff.SAMPLERS["ddim"]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'latentdiff' has no attribute 'Unet'"):
        latentdiff.Unet  # noqa: B018


def test_listing_the_names_imports_no_torch():
    code = "import json, sys, latentdiff; print(json.dumps([dir(latentdiff), 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, has_torch = json.loads(done.stdout)
    assert set(latentdiff.__all__) <= set(names) and not has_torch
