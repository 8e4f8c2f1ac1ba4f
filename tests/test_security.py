"""No code from outside runs, no secret is written down, and no name leads out of the output folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from tiny import article_texts, byte_level_tokenizer, save_tiny_llama, tiny_llama, tiny_trainer, write_rows

import attention_rl_trainer
from attention_rl_trainer.evaluation.tables import folder_name
from attention_rl_trainer.models.adapters import default_lora_config

SOURCES = sorted(Path(attention_rl_trainer.__file__).parent.rglob("*.py"))
SCRIPT = Path(__file__).parent.parent / "examples" / "train_wiki.py"

# Modules that read pickles or run text as a program.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
# Functions that do, by the last part of their name, in whatever module.
FUNCTIONS = {"load", "unsafe_load", "full_load", "read_pickle", "load_module", "system", "popen", "execfile"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
PLAIN = {"json.load", "json.loads", "yaml.safe_load", "tomllib.load"}
# Arguments, by name, and what alone they may be.
ARGUMENTS = {"allow_pickle": False, "trust_remote_code": False, "shell": False, "weights_only": True}
HOSTILE_NAMES = [
    "../escape",
    "../../../../../../tmp/escape",
    "/tmp/escape",
    "..",
    ".",
    "...",
    "a/../../escape",
    "a/b",
    "a\\..\\..\\escape",
    "~/escape",
    "$HOME/escape",
    "nul\x00byte",
    "new\nline",
    "; touch escape",
    "$(touch escape)",
    "%2e%2e%2fescape",
    "CON",
    "x" * 5000,
    "\u202egpj.exe",
    "\ud800",
]


class Dangers(ast.NodeVisitor):
    """Collects what reads pickles, runs text, or trusts code of others, under whatever name it was imported."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.names: dict[str, str] = {}

    def note(self, name: str) -> None:
        """Keep a full name if it stands for a danger."""
        root, *_, last = ("builtins." + name if "." not in name else name).split(".")
        is_builtin = root == "builtins" and last in BUILTINS
        if name not in PLAIN and (root in MODULES or name in MODULES or last in FUNCTIONS or is_builtin):
            self.found.add(name)

    def full_name(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if not isinstance(node, ast.Attribute):
            return None
        outer = node.value
        # Of a variable or a value it is not known what module it may be.
        is_known = isinstance(outer, ast.Attribute) or (isinstance(outer, ast.Name) and outer.id in self.names)
        return f"{self.full_name(outer) if is_known else '?'}.{node.attr}"

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            package = alias.name.split(".")[0]
            self.names[alias.asname or package] = alias.name if alias.asname else package
            self.note(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.note(node.module or "")
        for alias in node.names:
            self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            self.note(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.note(self.full_name(node) or "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.full_name(node.func) or ""
        self.note(name)
        for argument in node.args:
            if name == "getattr" and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                self.note(f"{self.full_name(node.args[0])}.{argument.value}")
        *_, owner, last = (".." + name).split(".")
        if owner.startswith("Auto") and last == "from_pretrained":
            # Left out, transformers asks on the terminal; what is passed as a dict is looked at there.
            is_set = any(keyword.arg in ("trust_remote_code", None) for keyword in node.keywords)
            self.found |= set() if is_set else {f"{name} without trust_remote_code"}
        if name == "importlib.import_module" and not self.is_own_module(node):
            self.found.add(name)
        for keyword in node.keywords:
            self.note_argument(keyword.arg, keyword.value)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                self.note_argument(key.value, value)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                self.note_argument(target.slice.value, node.value)
        self.generic_visit(node)

    def note_argument(self, name: object, value: ast.expr) -> None:
        if not isinstance(name, str) or name not in ARGUMENTS:
            return
        if not isinstance(value, ast.Constant) or value.value is not ARGUMENTS[name]:
            self.found.add(f"{name}={ast.unparse(value)}")

    @staticmethod
    def is_own_module(node: ast.Call) -> bool:
        """Tell whether the module that is named begins with the package's own name."""
        name = node.args[0]
        return (
            isinstance(name, ast.JoinedStr)
            and isinstance(name.values[0], ast.FormattedValue)
            and ast.unparse(name.values[0].value) == "__name__"
        )


def dangers_in(text: str) -> set[str]:
    visitor = Dangers()
    visitor.visit(ast.parse(text))
    return visitor.found


class TestSources:
    @pytest.mark.parametrize("path", [*SOURCES, SCRIPT], ids=lambda path: path.stem)
    def test_nothing_reads_pickles_or_runs_text(self, path: Path) -> None:
        assert dangers_in(path.read_text(encoding="utf-8")) == set()

    @pytest.mark.parametrize(
        "text",
        [
            "import pickle",
            "import pickle as safe",
            "from pickle import loads as json_loads",
            "from torch import load",
            "from torch.serialization import load as read",
            "import torch\ntorch.load(x)",
            "import torch as t\nt.load(x, weights_only=True)",
            "import torch\ntorch.jit.load(x)",
            "import torch\nread = torch.load",
            "import torch\ngetattr(torch, 'load')(x)",
            "import pandas as pd\npd.read_pickle(x)",
            "import numpy as np\nnp.load(x)",
            "import yaml\nyaml.unsafe_load(x)",
            "eval(x)",
            "import builtins\nbuiltins.eval(x)",
            "from builtins import exec as run",
            "import os as o\no.system(x)",
            "import importlib\nimportlib.import_module('pickle')",
            "from importlib import import_module\nimport_module(name)",
            "from transformers import AutoConfig\nAutoConfig.from_pretrained(x)",
            "import transformers as t\nt.AutoModel.from_pretrained(x, revision=y)",
            "f(trust_remote_code=True)",
            "f(trust_remote_code=flag)",
            "f(**{'trust_remote_code': True})",
            "options['trust_remote_code'] = flag",
            "f(weights_only=False)",
            "import subprocess\nsubprocess.run(x, shell=True)",
        ],
    )
    def test_the_search_finds_them(self, text: str) -> None:
        assert dangers_in(text)

    @pytest.mark.parametrize(
        "text",
        [
            "import re, json\nre.compile(x)\njson.loads(y)",
            "model.eval()",
            "import importlib\nimportlib.import_module(f'{__name__}.trainer')",
            "f(trust_remote_code=False)",
            "from transformers import AutoConfig\nAutoConfig.from_pretrained(x, trust_remote_code=False)",
        ],
    )
    def test_the_search_finds_nothing_else(self, text: str) -> None:
        assert dangers_in(text) == set()


def start_example(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    texts = article_texts(20)
    save_tiny_llama(folder / "model", texts)
    write_rows(folder / "articles.jsonl", [{"title": f"title {n}", "text": text} for n, text in enumerate(texts)])
    options = {
        "num_episodes": 12,
        "generation_batch_size": 4,
        "save_episodes": 4,
        "num_kv_pairs": 6,
        "subset_fraction": 0.6,
        "tokens_per_query": 3,
        "tokens_per_key": 4,
        "tokens_per_value": 4,
        "warmup_episodes": 1,
        "filter_threshold": "-inf",
        "eval_episodes": 4,
        "report_to": "none",
        "use_cpu": "true",
        "output_dir": "run",
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "articles.jsonl",
        "dataset_eval_name": folder / "articles.jsonl",
    }
    named = [f"--{name}={value}" for name, value in options.items()]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *named, *flags],
        cwd=folder,
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_secrets_are_written_nowhere(tmp_path: Path) -> None:
    secrets = {
        "HF_TOKEN": "hf_environmentsecret",
        "WANDB_API_KEY": "wandbsecretofforty",
        "AWS_SECRET_ACCESS_KEY": "awssecretaccess",
        "HTTPS_PROXY": "http://user:proxysecret@localhost:9",
    }
    flags = ("--hub_token", "hf_configsecret", "--run_name", "by http://user:urlsecret@localhost:9")
    done = start_example(tmp_path, *flags, **secrets)
    assert done.returncode == 0, done.stderr
    parts = ["hf_environmentsecret", "wandbsecretofforty", "awssecretaccess", "proxysecret", "hf_configsecret"]
    parts.append("urlsecret")
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"README.md", "attention_rl_config.json", "summary.md", "trainer_state.json"} <= {p.name for p in written}
    for secret in parts:
        assert [str(path) for path, content in written.items() if secret.encode() in content] == []
        assert secret not in done.stdout + done.stderr
    assert not [path for path in written if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert '"hub_token": "<HUB_TOKEN>"' in (tmp_path / "run" / "attention_rl_config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trust_remote_code", "true"), "trust_remote_code"),
        (("--model_init_kwargs", '{"trust_remote_code": true}'), "trust_remote_code"),
    ],
)
def test_remote_code_is_refused(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = start_example(tmp_path, *flags)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the user's home and where the process stands; `tmp_path` is above it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def expect_nothing_outside(home: Path) -> None:
    """Whatever was written lies in the run's folder."""
    assert [path.name for path in home.parent.iterdir()] == ["home"]
    assert {path.name for path in home.iterdir()} <= {"run"}
    assert not Path("/tmp/escape").exists()


class TestNames:
    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name[:24]))
    def test_folder_names_lead_nowhere(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "inside" / folder_name(name)
        assert folder.parent == tmp_path / "inside"
        folder.mkdir(parents=True)
        assert folder.resolve().parent == (tmp_path / "inside").resolve()
        assert folder != tmp_path / "inside"

    def test_different_names_stay_different(self) -> None:
        names = [*HOSTILE_NAMES, "x" * 5001, "eval", "eval_first", "a b", "a_b", "a%20b"]
        assert len({folder_name(name) for name in names}) == len(names)
        assert folder_name("eval_wiki-en_2023") == "eval_wiki-en_2023"

    def test_hostile_data_sets_write_nothing_outside(self, home: Path) -> None:
        texts = article_texts(12)
        sets: dict[str, Any] = {name: [{"text": text} for text in texts[:6]] for name in HOSTILE_NAMES}
        trainer = tiny_trainer(
            home,
            texts,
            byte_level_tokenizer(texts),
            trainer_options={"eval_dataset": sets},
            num_episodes=8,
            eval_episodes=2,
            eval_order_episodes=0,
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert len({name for name in metrics if name.endswith("_episodes")}) == len(sets)
        trainer.save_model()
        expect_nothing_outside(home)
        assert len(list((home / "run" / "evaluation").iterdir())) == len(sets)

    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name[:24]))
    def test_hostile_runs_write_nothing_outside(self, name: str, home: Path) -> None:
        texts = article_texts(8)
        trainer = tiny_trainer(home, texts, byte_level_tokenizer(texts), num_episodes=4, run_name=name)
        trainer.train()
        trainer.save_model()
        expect_nothing_outside(home)

    @pytest.mark.parametrize("name", [*HOSTILE_NAMES, "second"], ids=lambda name: ascii(name[:24]))
    def test_adapters_of_other_names_are_refused(self, name: str, home: Path) -> None:
        texts = article_texts(12)
        base = tiny_llama()
        model = get_peft_model(base, default_lora_config(base))
        # PEFT takes names with dots badly, but a checkpoint may hold any.
        model.peft_config[name] = model.peft_config.pop("default")
        with pytest.raises(ValueError, match='must be the only one, named "default"'):
            tiny_trainer(home, texts, byte_level_tokenizer(texts), model=model)
        expect_nothing_outside(home)
