"""The package as it is imported and as it is shipped."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attention_rl_trainer

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "attention_rl_trainer"
HEAVY = ("torch", "transformers", "numpy", "datasets", "peft", "accelerate", "trl", "rich", "huggingface_hub")
MEASURE_IMPORT = """\
import json, sys, time
started = time.perf_counter()
import attention_rl_trainer
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def import_afresh() -> tuple[float, set[str]]:
    """Import the package in a new interpreter: seconds that it took, modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_IMPORT], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    return found["seconds"], set(found["modules"])


class TestImport:
    def test_is_quick_and_loads_nothing_heavy(self) -> None:
        runs = [import_afresh() for _ in range(3)]
        assert min(seconds for seconds, _ in runs) < 0.5
        loaded = runs[0][1]
        assert not loaded & set(HEAVY)
        assert {name for name in loaded if name.startswith("attention_rl_trainer")} == {
            "attention_rl_trainer",
            "attention_rl_trainer._version",
        }


def names_for_type_checkers() -> dict[str, str]:
    """The module of each public name, as the block for type checkers imports it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


class TestPublicNames:
    @pytest.mark.parametrize("name", attention_rl_trainer.__all__)
    def test_is_there(self, name: str) -> None:
        value = getattr(attention_rl_trainer, name)
        # Kept after the first use, so that it is looked up once.
        assert vars(attention_rl_trainer)[name] is value

    def test_lists_agree(self) -> None:
        assert {*names_for_type_checkers(), "__version__"} == set(attention_rl_trainer.__all__)
        assert len(set(attention_rl_trainer.__all__)) == len(attention_rl_trainer.__all__)
        assert dir(attention_rl_trainer) == sorted(attention_rl_trainer.__all__)

    @pytest.mark.parametrize(("name", "module"), names_for_type_checkers().items())
    def test_type_checkers_see_the_same_object(self, name: str, module: str) -> None:
        assert getattr(importlib.import_module(module), name) is getattr(attention_rl_trainer, name)

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match=r"^module 'attention_rl_trainer' has no attribute 'nonsense'$"):
            _ = attention_rl_trainer.nonsense
        assert not hasattr(attention_rl_trainer, "nonsense")

    def test_star_import_gives_them_all(self) -> None:
        names: dict[str, object] = {}
        exec("from attention_rl_trainer import *", names)
        assert set(attention_rl_trainer.__all__) <= set(names)

    def test_a_submodule_is_still_reached_by_import(self) -> None:
        from attention_rl_trainer.records import ledger

        assert ledger.read_ledger is attention_rl_trainer.read_ledger


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that is built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("attention_rl_trainer", "tests", "examples", "docs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"attention_rl_trainer-{attention_rl_trainer.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class TestWheel:
    def test_holds_every_module_and_config(self, wheel_names: set[str]) -> None:
        data = [*PACKAGE.rglob("*.json"), *PACKAGE.glob("configs/*.yaml"), PACKAGE / "py.typed"]
        data += [*PACKAGE.glob("pages/assets/*"), *PACKAGE.glob("publishing/*.jinja")]
        files = [*PACKAGE.rglob("*.py"), *data]
        assert {path.relative_to(REPOSITORY).as_posix() for path in files} <= wheel_names

    def test_holds_nothing_else(self, wheel_names: set[str]) -> None:
        metadata = f"attention_rl_trainer-{attention_rl_trainer.__version__}.dist-info"
        assert {name.split("/")[0] for name in wheel_names} == {"attention_rl_trainer", metadata}
        package = {name for name in wheel_names if name.startswith("attention_rl_trainer/")}
        known = {".css", ".html", ".jinja", ".js", ".json", ".py", ".typed", ".yaml"}
        assert {Path(name).suffix for name in package} == known
        assert f"{metadata}/licenses/LICENSE" in wheel_names
