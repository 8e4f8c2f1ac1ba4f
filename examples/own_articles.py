"""Articles of your own: the Markdown and text files of a folder, read when they are needed.

`train_dataset` takes any `datasets` data set with a text column, and whatever has a length and gives rows by number
(`ArticleSource`): a list of rows, or a class such as this one.

    python examples/own_articles.py NOTES_FOLDER
"""

import sys
from pathlib import Path
from typing import Any

from attention_rl_trainer import AttentionGuidedRLConfig, AttentionGuidedRLTrainer


class Folder:
    """The text files below a folder; a row is ``{"title": ..., "text": ...}``."""

    def __init__(self, folder: str | Path, endings: tuple[str, ...] = (".md", ".txt")) -> None:
        self.files = sorted(path for path in Path(folder).rglob("*") if path.suffix in endings)
        if not self.files:
            raise ValueError(f"{folder} holds no file that ends in {', '.join(endings)}; give another folder")

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, str]:
        """Read a file; the same number gives the same file, so that a run can be resumed."""
        path = self.files[row]
        return {"title": path.stem, "text": path.read_text(encoding="utf-8")}


def main(folder: str | Path, model: Any = "offline", processing_class: Any = None, **options: Any) -> Any:
    """Train on the files of a folder; those that are too short are counted and passed over."""
    settings = {"output_dir": "out/own_articles", "num_episodes": 64, "generation_batch_size": 16}
    trainer = AttentionGuidedRLTrainer(
        model=model,
        args=AttentionGuidedRLConfig(**settings | options),
        train_dataset=Folder(folder),
        processing_class=processing_class,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
