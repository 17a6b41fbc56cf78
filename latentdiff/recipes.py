"""The recipes that come with the package: folders of configs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_INSTALLED = Path(__file__).parent / "configs"  # in a wheel
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Recipe:
    """A folder of configs. name: relative to the folder of all, such as "systems/fashion-28"; title: what it is."""

    name: str
    title: str
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return CONFIGS / self.name


def recipes() -> list[Recipe]:
    """All recipes, by name; a folder with a config of a stage is one."""
    return sorted(_found(), key=lambda recipe: recipe.name)


def _found() -> Iterator[Recipe]:
    for folder in {path.parent for path in CONFIGS.rglob("*.yaml") if path.name in ("vae.yaml", "unet.yaml")}:
        files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
        main = folder / "unet.yaml"
        yield Recipe(folder.relative_to(CONFIGS).as_posix(), _title(main if main in files else files[0]), files)


def _title(path: Path) -> str:
    """The first sentence of the comment at the top of a config."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"\. (?=[A-Z])", " ".join(lines))[0].rstrip(".")  # not at "et al. 2023"


def no_config(path: Path) -> str:
    """Why a config that is not there is not, and what its name may mean."""
    if path.is_dir():
        files = [str(path / name) for name in ("vae.yaml", "unet.yaml") if (path / name).is_file()]
        return f"config {path} is a folder; give {' or '.join(files) if files else 'a YAML file'}"
    folder = path.parent if path.suffix == ".yaml" else path
    known = next((one for one in recipes() if folder.as_posix() in (one.name, f"configs/{one.name}")), None)
    hint = f"; `latentdiff configs {known.name} --write {folder}` writes it" if known else ""
    return f"config {path} does not exist{hint}"
