"""Everything that only a GPU can answer, in the order of worth, in nine minutes at most.

    python tests/benchmarks/gpu.py                              # make gpu
    python tests/benchmarks/gpu.py --only smoke,floor           # some of the parts
    python tests/benchmarks/gpu.py --device cpu --tiny          # a rehearsal of every part's code, without a figure
    python tests/benchmarks/gpu.py --only learning --recipes recommended --minutes 5

Each part (`gpu_parts`) runs in a process of its own, so that a crash, a lack of memory or a lack of time in one leaves
the others, and what it has measured by then is in its file, ``<output>/<part>.json``. Needs nothing but Python itself:
without torch, or without CUDA, it says so and ends with 0. `docs/gpu.md` says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
# In the order of worth; seconds that each may take.
LIMITS = {"smoke": 130, "floor": 190, "plan": 100, "peer": 110, "learning": 300}
# Takes as long as it is given, so it is run only where it is asked for.
ON_REQUEST = {"learning"}
# Less is not worth starting a part for.
_SHORTEST = 10
_TAIL = 4000


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Checks and figures that need a GPU.")
    default = [name for name in LIMITS if name not in ON_REQUEST]
    parts = ", ".join(LIMITS)
    parser.add_argument("--only", default=",".join(default), help=f"parts, of {parts}; by default %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu", help="folder of the JSON files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches: a rehearsal, no figures")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--commit", help="what is checked out, where there is no git; also ATTENTION_RL_COMMIT")
    parser.add_argument("--recipes", default="recommended", help="options files that learning runs one after the other")
    found = parser.parse_args(arguments)
    found.parts = [name for name in LIMITS if name in found.only.split(",")]
    unknown = set(found.only.split(",")) - set(LIMITS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(LIMITS)}")
    if found.device == "cpu" and not found.tiny:
        parser.error("--device cpu is for a rehearsal alone; add --tiny")
    return found


def read_facts(environment: dict[str, str]) -> dict[str, Any] | str:
    """Ask for device and versions in a process of its own; returns why not where torch cannot be imported."""
    command = [sys.executable, str(FOLDER / "gpu_facts.py")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50, check=False)
    except subprocess.TimeoutExpired:
        return "torch did not start within 50 s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else "nothing was printed"
    return dict(json.loads(last)) if done.returncode == 0 else last


def read(path: Path) -> dict[str, Any]:
    """Read a part's file as far as it was written."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a part's file, whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    new.replace(path)


def run_part(
    part: str, arguments: argparse.Namespace, facts: dict[str, Any], environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run a part in a process of its own, and complete its file; returns what is in it."""
    path = arguments.output / f"{part}.json"
    started = time.monotonic()
    content = {"part": part, "status": "running", "command": " ".join(sys.argv), "limit_s": round(limit), **facts}
    if arguments.tiny:
        content["rehearsal"] = "tiny models: the figures mean nothing"
    write(path, content)
    command = [sys.executable, str(FOLDER / "gpu_parts.py"), part, str(path), arguments.device, str(int(limit))]
    # Importing what it needs takes part of its time.
    command += ["--since", str(time.time()), "--recipes", arguments.recipes] + (["--tiny"] if arguments.tiny else [])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    status = "failed"
    try:
        output, _ = process.communicate(timeout=limit)
        status = {0: "done", 3: "skipped"}.get(process.returncode, "failed")
    except subprocess.TimeoutExpired:
        status = "out of time"
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    content = content | read(path) | {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if status in ("failed", "out of time"):
        content |= {"exit_code": process.returncode, "output_tail": output[-_TAIL:]}
    write(path, content)
    return content


def describe(content: dict[str, Any]) -> str:
    """Say in a few lines how a part ended, and its figures."""
    lines = [f"{content['part']}: {content['status']} after {content['seconds']} s"]
    lines += [f"  {content['reason']}"] if "reason" in content else []
    lines += [f"  {name}: {value}" for name, value in content.get("figures", {}).items()]
    lines += ["  " + line for line in content.get("output_tail", "").splitlines()[-12:]]
    return "\n".join(lines)


def main() -> int:
    """Run the parts; returns 1 if one failed or ran out of time, else 0."""
    arguments = parse_arguments()
    end = time.monotonic() + 60 * arguments.minutes
    named = ", ".join(arguments.parts)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if arguments.commit:
        environment["ATTENTION_RL_COMMIT"] = arguments.commit
    facts = read_facts(environment)
    if isinstance(facts, str):
        print(f"skipped {named}: {facts}. Run it with a Python that has torch: make gpu GPU_PYTHON=...")
        return 0
    if arguments.device == "cuda" and facts["card"] is None:
        print(f"skipped {named}: torch {facts['versions']['torch']} finds no CUDA GPU here")
        return 0
    print(f"{facts['card'] or 'CPU'}, driver {facts['driver']}, versions {facts['versions']}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    ended = []
    for part in arguments.parts:
        limit = min(LIMITS[part], end - time.monotonic())
        if limit < _SHORTEST:
            print(f"{part}: skipped, the {arguments.minutes:g} minutes are over", flush=True)
            continue
        ended.append(run_part(part, arguments, facts, environment, limit))
        print(describe(ended[-1]), flush=True)
    print(f"files in {arguments.output}" + ("; a rehearsal: its figures mean nothing" if arguments.tiny else ""))
    return int(any(content["status"] in ("failed", "out of time") for content in ended))


if __name__ == "__main__":
    sys.exit(main())
