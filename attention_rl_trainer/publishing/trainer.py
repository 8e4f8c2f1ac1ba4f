"""A Trainer whose adapters come with a card, and go to the Hub as an allow-list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_rl_trainer.durability.staging import staged_files
from attention_rl_trainer.durability.trainer import DurableTrainer
from attention_rl_trainer.publishing.card import CardFacts, write_card
from attention_rl_trainer.publishing.published import CARD_NAME


class PublishingTrainer(DurableTrainer):
    """A `DurableTrainer` that writes a card at every save; a subclass says what is on it."""

    _tag_names: Sequence[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card_metadata: dict[str, Any] = {}
        """What a user gave for the head of the card."""

    def card_facts(self) -> CardFacts:
        """Collect what the card says of the adapter."""
        raise NotImplementedError

    def save_card(self, folder: Path, *, with_picture: bool) -> None:
        """Write the card of what the adapter is, with a picture of the learning curve where it is wanted."""
        write_card(folder, self.output_dir, self.card_facts(), with_picture=with_picture)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card into the run's folder; what is given is in its head, and in that of later ones.

        Args:
            tags: beside those of the trainer.
            dataset: data sets of the Hub.
            finetuned_from: the base model, by its name on the Hub.

        Raises:
            ValueError: something is given that the head of this card does not hold.
        """
        refused = {"tasks": tasks, "dataset_tags": dataset_tags, "dataset_args": dataset_args}
        if given := [name for name, value in refused.items() if value is not None]:
            raise ValueError(
                "the card takes language, license, tags, model_name, finetuned_from and dataset; leave out "
                f"{', '.join(given)}, or write it into {CARD_NAME} yourself"
            )
        head = {
            "language": language,
            "license": license,
            "tags": None if tags is None else [*self._tag_names, *([tags] if isinstance(tags, str) else tags)],
            "model_name": model_name,
            "base_model": finetuned_from,
            "datasets": [dataset] if isinstance(dataset, str) else dataset,
        }
        self.card_metadata |= {name: value for name, value in head.items() if value is not None}
        if self.processes.is_main:
            with staged_files(self.output_dir) as staging:
                self.save_card(staging, with_picture=True)
