"""A command line that cannot be understood, as an error in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class PlainParser(argparse.ArgumentParser):
    """A parser that raises what is wrong, where argparse prints the usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, and where help is.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; {self.prog} --help explains what there is")
