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
from attention_rl_trainer.adapters import default_lora_config
from attention_rl_trainer.evaluation import folder_name

SOURCES = sorted(Path(attention_rl_trainer.__file__).parent.rglob("*.py"))
SCRIPT = Path(__file__).parent.parent / "examples" / "train_wiki.py"

# What reads a pickle, or runs text as a program.
FORBIDDEN = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"),
    *("torch.load", "torch.save", "torch.hub", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
}
FORBIDDEN_ARGUMENTS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True), ("weights_only", False)}
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


def names_in(tree: ast.AST) -> set[str]:
    """Collect imported modules, dotted names, and names that are called."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} | {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
    return found


def arguments_in(tree: ast.AST) -> set[tuple[str, object]]:
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg is not None]
    return {(node.arg, node.value.value) for node in keywords if isinstance(node.value, ast.Constant) and node.arg}


class TestSources:
    @pytest.mark.parametrize("path", [*SOURCES, SCRIPT], ids=lambda path: path.stem)
    def test_nothing_reads_pickles_or_runs_text(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not names_in(tree) & FORBIDDEN
        assert not arguments_in(tree) & FORBIDDEN_ARGUMENTS

    @pytest.mark.parametrize(
        "text",
        [
            "import pickle",
            "from torch import load",
            "import torch\ntorch.load(x)",
            "eval(x)",
            "import torch.hub as h",
            "f(trust_remote_code=True)",
            "import subprocess\nsubprocess.run(x, shell=True)",
        ],
    )
    def test_the_search_finds_them(self, text: str) -> None:
        tree = ast.parse(text)
        assert names_in(tree) & FORBIDDEN or arguments_in(tree) & FORBIDDEN_ARGUMENTS


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
    done = start_example(tmp_path, "--hub_token", "hf_configsecret", **secrets)
    assert done.returncode == 0, done.stderr
    parts = ["hf_environmentsecret", "wandbsecretofforty", "awssecretaccess", "proxysecret", "hf_configsecret"]
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"README.md", "attention_rl_config.json", "summary.md", "trainer_state.json"} <= {p.name for p in written}
    for secret in parts:
        assert [str(path) for path, content in written.items() if secret.encode() in content] == []
        assert secret not in done.stdout + done.stderr
    assert not [path for path in written if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert '"hub_token": "<HUB_TOKEN>"' in (tmp_path / "run" / "attention_rl_config.json").read_text()


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

    def test_hostile_data_sets_write_nothing_outside(self, tmp_path: Path) -> None:
        texts = article_texts(12)
        sets: dict[str, Any] = {name: [{"text": text} for text in texts[:6]] for name in HOSTILE_NAMES[:-1]}
        home = tmp_path / "home"
        home.mkdir()
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
        assert [path.name for path in tmp_path.iterdir()] == ["home"]
        assert [path.name for path in home.iterdir()] == ["run"]
        assert len(list((home / "run" / "evaluation").iterdir())) == len(sets)

    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name[:24]))
    def test_hostile_runs_write_nothing_outside(self, name: str, tmp_path: Path) -> None:
        texts = article_texts(8)
        home = tmp_path / "home"
        home.mkdir()
        trainer = tiny_trainer(home, texts, byte_level_tokenizer(texts), num_episodes=4, run_name=name)
        trainer.train()
        trainer.save_model()
        assert [path.name for path in tmp_path.iterdir()] == ["home"]
        assert [path.name for path in home.iterdir()] == ["run"]

    @pytest.mark.parametrize("name", [*HOSTILE_NAMES[:4], "second"])
    def test_adapters_of_other_names_are_refused(self, name: str, tmp_path: Path) -> None:
        texts = article_texts(12)
        base = tiny_llama()
        model = get_peft_model(base, default_lora_config(base))
        # PEFT takes names with dots badly, but a checkpoint may hold any.
        model.peft_config[name] = model.peft_config.pop("default")
        with pytest.raises(ValueError, match='must be the only one, named "default"'):
            tiny_trainer(tmp_path, texts, byte_level_tokenizer(texts), model=model)
