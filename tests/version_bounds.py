"""What pip may install for the suite at one end of setup.cfg's ranges, one constraint a line (`make test-oldest`).

    python tests/version_bounds.py {newest,oldest}

torch stays as it is pinned, at both ends: any other build is gigabytes of CUDA.
"""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def requirements() -> list[str]:
    """Every requirement of setup.cfg, those of the extras too, but for the package itself."""
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    blocks = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    own = setup["metadata"]["name"]
    return sorted({line for block in blocks for line in block.split("\n") if line and not line.startswith(own)})


def lowest(requirement: str) -> str:
    """Pin a requirement such as ``peft>=0.21,<0.22`` to its lower bound, ``peft==0.21``.

    Raises:
        ValueError: the requirement does not begin with a lower bound.
    """
    match = re.match(r"([\w.-]+)>=([\w.]+)(,|$)", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} in setup.cfg: expected a lower bound first, such as 'peft>=0.21,<0.22'")
    return f"{match[1]}=={match[2]}"


def constraints(end: str) -> list[str]:
    """The constraints at one end, "newest" or "oldest"."""
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = [line for line in pinned if line.startswith("torch==")]
    if end == "newest":
        return torch
    return torch + [lowest(requirement) for requirement in requirements() if not requirement.startswith("torch>=")]


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1])))
