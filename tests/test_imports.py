"""What importing the package does, which module may import which, and what no source file may use."""

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentdiff

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "latentdiff"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("train_*.py")])
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(latentdiff.__path__, "latentdiff.") if not module.ispkg
)


def run(code: str, folder: Path) -> dict[str, object]:
    """What a fresh interpreter in an empty home and working folder prints, as JSON."""
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    environment = os.environ | home | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_version_without_torch(tmp_path):
    code = """
import json, sys
import latentdiff
heavy = ["torch", "transformers", "accelerate", "datasets", "pydantic", "numpy"]
print(json.dumps({"version": latentdiff.__version__, "loaded": [name for name in heavy if name in sys.modules]}))
"""
    assert run(code, tmp_path) == {"version": latentdiff.__version__, "loaded": []}


def test_help_without_torch(tmp_path):
    code = """
import contextlib, io, json, sys
from latentdiff.cli import main
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    main(["--help"])
print(json.dumps({"torch": "torch" in sys.modules, "help": "generate" in text.getvalue()}))
"""
    assert run(code, tmp_path) == {"torch": False, "help": True}


def test_imports_have_no_side_effects(tmp_path):
    """All modules in one process: no file, no thread count, no random state, no device is touched."""
    code = f"""
import json, os, sys
import torch
state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
precision = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
import accelerate, datasets, transformers
environment = dict(os.environ)
import importlib
for name in {MODULES!r}:
    importlib.import_module(name)
print(json.dumps({{
    "cuda": torch.cuda.is_initialized(),
    "random": torch.equal(state, torch.get_rng_state()),
    "threads": torch.get_num_threads() == threads,
    "dtype": torch.get_default_dtype() == dtype,
    "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32) == precision,
    "environment": dict(os.environ) == environment,
}}))
"""
    unchanged = dict.fromkeys(["random", "threads", "dtype", "precision", "environment"], True)
    assert run(code, tmp_path) == {"cuda": False} | unchanged
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"


def test_public_names():
    assert {name for name in latentdiff.__all__ if hasattr(latentdiff, name)} == set(latentdiff.__all__)
    assert latentdiff.UNet.__module__ == "latentdiff.models.unet"
    with pytest.raises(AttributeError, match="module 'latentdiff' has no attribute 'Unet'"):
        latentdiff.Unet  # noqa: B018


# --- who may import whom ---


def imported(path: Path) -> set[str]:
    """The absolute names of the modules that a file imports anywhere, but for type checking alone."""
    names: set[str] = set()
    for node in reached(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reached(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from reached(child)


def ours(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    return {name for name in imported(path) if name in MODULES}


def test_imports_are_found():
    assert "latentdiff.diffusion" in ours(PACKAGE / "samplers.py") and "torch" in imported(PACKAGE / "samplers.py")
    assert "latentdiff.config" not in ours(PACKAGE / "formats" / "diffusers_folder.py")  # for type checking only


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("diffusion", set()),
        ("spacing", {"latentdiff.diffusion"}),
        ("samplers", {"latentdiff.diffusion", "latentdiff.spacing"}),
        ("starting_points", {"latentdiff.diffusion", "latentdiff.samplers"}),
        ("guidance", {"latentdiff.diffusion", "latentdiff.models.unet", "latentdiff.models.layers"}),
        ("config", set()),
        ("training/randomness", set()),
        ("training/schedules", {"latentdiff.config"}),
        ("training/sharding", set()),
        ("training/ema", {"latentdiff.training.sharding"}),
        ("training/loss_meter", {"latentdiff.training.sharding"}),
        ("training/stopping", set()),
        ("training/together", set()),
        ("formats/diffusers_folder", set()),
        ("models/layers", set()),
        ("models/modes", set()),
        ("models/pixel_space", {"latentdiff.config", "latentdiff.models.autoencoder"}),
        (
            "latent_cache",
            {
                "latentdiff.data",
                "latentdiff.formats.diffusers_folder",
                "latentdiff.models.pixel_space",
                "latentdiff.models.text",
                "latentdiff.training.together",
            },
        ),
        ("data", {"latentdiff.config", "latentdiff.training.randomness"}),
    ],
)
def test_dependency_direction(module, allowed):
    assert ours(PACKAGE / f"{module}.py") <= allowed


@pytest.mark.parametrize("module", ["diffusion", "samplers", "starting_points"])
def test_mathematics_knows_no_files_and_no_frameworks(module):
    packages = {name.partition(".")[0] for name in imported(PACKAGE / f"{module}.py")}
    foreign = packages - set(sys.stdlib_module_names) - {"latentdiff"}
    assert foreign <= {"torch", "numpy"}
    assert not packages & {"pathlib", "os", "io", "json", "shutil"}


def test_models_know_neither_training_nor_data():
    for path in (PACKAGE / "models").glob("*.py"):
        outside = {name for name in ours(path) if not name.startswith("latentdiff.models.")}
        assert outside <= {"latentdiff.config", "latentdiff.formats.diffusers_folder"}, path
        assert not {name.partition(".")[0] for name in imported(path)} & {"accelerate", "datasets"}, path


def test_package_does_not_need_what_only_tests_need():
    for path in SOURCES:
        packages = {name.partition(".")[0] for name in imported(path)}
        assert not packages & {"diffusers", "pytest", "tests"}, path


# --- what is not used ---


def calls(path: Path) -> set[str]:
    """Dotted names of everything that a file calls."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_a_file_says(path):
    """No pickle in any form and no evaluation of text: opening a model or a config cannot run code."""
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name.partition(".")[0] for name in imported(path)} & forbidden_modules
    used = calls(path)
    names = {"eval", "exec", "compile", "__import__"}
    dotted = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}
    assert not used & (names | dotted)
    assert not {name for name in imported(path) if name in dotted}


def test_sources_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"train_vae.py", "train_unet.py", "latentdiff/__init__.py", "latentdiff/training/checkpoint.py"} <= names
    assert "yaml.safe_load" in calls(PACKAGE / "config.py")
