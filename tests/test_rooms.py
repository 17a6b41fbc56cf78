"""Which module may import which, what an import does, and what no source file may use."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentdiff"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("train_*.py")])
}
SOURCES = [*MODULES.values(), *sorted((ROOT / "tools").glob("*.py"))]
# A room imports only from itself and from rooms in the lines above its own; single files of one line may also import
# each other.
ORDER = [
    {"randomness", "distributed", "devices", "freed_memory", "images", "archives", "printable", "recipes"},
    {"diffusion"},
    {"config", "explain"},
    {"formats"},
    {"models"},
    {"data"},
    {"pipeline"},
    {"evaluation"},
    {"training"},
    {"train_vae", "train_unet"},
    {"serving"},
    {"commands"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SINGLE_FILES = {path.stem for path in PACKAGE.glob("*.py")}
FIGURES_USERS = {"pipeline", "evaluation", "training", "commands", "train_vae", "train_unet"}


def nodes(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """A node and all below it; without typing, not those under `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if typing or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from nodes(child, typing)


def imported(path: Path, typing: bool = True) -> set[str]:
    """The absolute names that a file imports anywhere, also in functions; with typing, also for type checking only."""
    names: set[str] = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), typing):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path, typing: bool = True) -> set[str]:
    """The project's modules that a file imports, without the packages that merely contain them."""
    names = {name for name in imported(path, typing) if name in MODULES}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def room(module: str) -> str:
    """latentdiff.diffusion.schedule -> diffusion; latentdiff.images -> images; train_vae -> train_vae."""
    return module.removeprefix("latentdiff.").split(".")[0]


def may_import(module: str, other: str) -> bool:
    here, there = room(module), room(other)
    if module == "latentdiff" or here == there:  # the package's own names are imported on first use
        return True
    if other == "latentdiff":  # __version__ and the public names
        return here in ("commands", "train_vae", "train_unet")
    if here == "figures":
        return there == "images"
    if there == "figures":
        return here in FIGURES_USERS
    return RANK[there] < RANK[here] or (RANK[there] == RANK[here] and {here, there} <= SINGLE_FILES)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES} - RANK.keys() == {"latentdiff", "figures"}
    assert {"train_vae", "train_unet", "latentdiff.training.checkpoint"} <= MODULES.keys()


def test_imports_point_one_way():
    offenders = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in sorted(ours(path))
        if not may_import(module, other)
    ]
    assert offenders == []


def test_no_modules_import_each_other_in_a_cycle():
    """When they run: an import for type checking only may point back."""
    edges = {module: ours(path, typing=False) - {module, "latentdiff"} for module, path in MODULES.items()}
    del edges["latentdiff"]
    while True:  # drop modules that import none of the others or are imported by none
        targets = set().union(*edges.values())
        outside = {module for module, others in edges.items() if not others or module not in targets}
        if not outside:
            break
        edges = {module: others - outside for module, others in edges.items() if module not in outside}
    assert edges == {}


def test_diffusion_imports_torch_numpy_scipy_and_itself_only():
    allowed = {"torch", "numpy", "scipy", "latentdiff"}
    files = {"pathlib", "os", "io", "json", "shutil"}
    offenders = [
        f"{path.name} imports {name}"
        for path in (PACKAGE / "diffusion").glob("*.py")
        for name in sorted(packages(path))
        if (name not in allowed and name not in sys.stdlib_module_names) or name in files
    ]
    offenders += [
        f"{path.name} imports {other}"
        for path in (PACKAGE / "diffusion").glob("*.py")
        for other in sorted(ours(path))
        if room(other) != "diffusion"
    ]
    assert offenders == []


def test_models_import_neither_accelerate_nor_datasets():
    offenders = [path.name for path in (PACKAGE / "models").glob("*.py") if packages(path) & {"accelerate", "datasets"}]
    assert offenders == []


def test_package_does_not_import_what_only_tests_need():
    """But for what compares an export with diffusers, if that is installed."""
    users = [path.name for path in SOURCES if packages(path) & {"diffusers", "pytest", "tests"}]
    assert users == ["interchange.py"]


def test_every_module_has_a_docstring():
    offenders = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text and not ast.get_docstring(ast.parse(text)):  # an empty __init__.py only makes a folder a package
            offenders.append(path.relative_to(ROOT).as_posix())
    assert offenders == []


# --- what an import does ---


def run(code: str, folder: Path) -> dict[str, object]:
    """What a new interpreter prints as JSON, with `folder` as its home and working folder."""
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    environment = os.environ | home | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_version_needs_no_torch(tmp_path):
    code = """
import json, sys
import latentdiff
heavy = ["torch", "transformers", "accelerate", "datasets", "pydantic", "numpy"]
print(json.dumps({"version": latentdiff.__version__, "loaded": [name for name in heavy if name in sys.modules]}))
"""
    result = run(code, tmp_path)
    assert result["loaded"] == [] and result["version"]


# Slow to import, and for none of what a pipeline does. torch._dynamo is torch's compiler.
HEAVY = ["transformers", "peft", "datasets", "accelerate", "huggingface_hub", "matplotlib", "torchmetrics"]
HEAVY += ["torch._dynamo"]


def test_pipeline_needs_no_training_libraries(tmp_path):
    """Nor transformers and the hub: to import it, to open a folder and to generate."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    code = f"""
import json, sys
import latentdiff.pipeline
def loaded():
    return [name for name in {HEAVY} if name in sys.modules]
result = {{"imported": loaded()}}
pipeline = latentdiff.pipeline.LatentDiffusionPipeline.from_pretrained("pipeline")
result["opened"] = loaded()
pipeline("a red (apple:1.2)", seed=0, num_inference_steps=2, guidance_scale=2.0, clip_skip=1, progress=False)
result["generated"] = loaded()
print(json.dumps(result))
"""
    assert run(code, tmp_path) == {"imported": [], "opened": [], "generated": []}


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
for name in {list(MODULES)!r}:
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


# --- what is not used ---

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"} | {
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
}


def calls(path: Path) -> set[str]:
    """Dotted names of everything that a file calls."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def test_no_source_runs_code_from_a_file():
    """No pickle in any form and no evaluation of text: opening a model or a config cannot run code."""
    offenders = {}
    for path in SOURCES:
        used = (packages(path) & UNSAFE_MODULES) | ((calls(path) | imported(path)) & UNSAFE_CALLS)
        if used:
            offenders[path.relative_to(ROOT).as_posix()] = sorted(used)
    assert offenders == {}
    assert "yaml.safe_load" in calls(PACKAGE / "config.py")  # calls are found
