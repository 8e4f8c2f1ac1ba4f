"""Trajectories into tables on the terminal, and logged metrics into a progress bar in episodes (design §10)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.summary import escape_control_characters

_POSTFIX = {"reward": "reward {:+.4f}", "kept_fraction": "kept {:.0%}", "query_gain": "query gain {:+.4f}"}


def trajectory_table(row: LedgerRow, max_characters: int = 60) -> Table:
    """Lay out the steps of one trajectory: query, chosen key, value, probability and reward.

    Texts are printed literally: square brackets are not markup, control characters are shown as escapes.

    Args:
        row: the trajectory, one row of the table per step.
        max_characters: length to which a text is shortened, the closing ellipsis counted.

    Raises:
        ValueError: `max_characters` is below 1.
    """
    if max_characters < 1:
        raise ValueError(f"max_characters must be at least 1, got {max_characters}")
    table = Table(title=_heading(row), caption=_outcome(row), title_justify="left", caption_justify="left")
    table.add_column("step", justify="right", no_wrap=True)
    for name in ("query", "chosen key", "value"):
        table.add_column(name, ratio=1, overflow="fold")
    for name in ("probability", "reward"):
        table.add_column(name, justify="right", no_wrap=True)
    steps = zip(row.queries, row.keys, row.values, row.chosen_probabilities, row.step_rewards, strict=True)
    for number, (query, key, value, probability, reward) in enumerate(steps, start=1):
        texts = (_literal(text, max_characters) for text in (query, key, value))
        table.add_row(str(number), *texts, f"{probability:.3f}", f"{reward:+.4f}")
    return table


class EpisodeProgressCallback(TrainerCallback):
    """A progress bar that counts episodes, with an occasional table of one trajectory above it.

    A step of the Trainer is a whole batch of episodes. Reward, kept fraction and query gain are beside the bar. Nothing
    is drawn outside the local main process. It replaces the Trainer's own bar, which counts steps: remove
    `transformers.trainer_callback.ProgressCallback` when this one is added. `disable_tqdm=True` hides the bar and
    leaves the tables.

    Args:
        num_episodes: episodes of the whole run.
        episodes_done: returns the episodes done so far; moves the bar where a step logs nothing.
        table_episodes: print a table whenever this many more episodes are done; None for never.
        latest_trajectory: returns the trajectory to print, None if there is none yet; needed with `table_episodes`.
        console: where bar and tables are written; standard error by default.
        num_before: trajectories of a warm start, which are among the counts but not among the episodes that are logged.

    Raises:
        ValueError: a count below 1, or only one of `table_episodes` and `latest_trajectory`.
    """

    def __init__(
        self,
        num_episodes: int,
        episodes_done: Callable[[], int],
        *,
        table_episodes: int | None = None,
        latest_trajectory: Callable[[], LedgerRow | None] | None = None,
        console: Console | None = None,
        num_before: int = 0,
    ) -> None:
        for name, count in {"num_episodes": num_episodes, "table_episodes": table_episodes}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if (table_episodes is None) != (latest_trajectory is None):
            raise ValueError("table_episodes and latest_trajectory go together: give both or neither")
        self.num_episodes = num_episodes
        self.episodes_done = episodes_done
        self.table_episodes = table_episodes
        self.num_before = num_before
        self.latest_trajectory = latest_trajectory
        self.console = Console(stderr=True) if console is None else console
        self._bar: tqdm | None = None
        self._tables_due = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar, at the episodes already done when a run is resumed."""
        self._close()
        if not state.is_local_process_zero:
            return
        done = self._episodes_done()
        self._tables_due = self._tables_by(done)
        self._bar = tqdm(
            total=self.num_episodes,
            initial=done,
            unit="episode",
            dynamic_ncols=True,
            disable=args.disable_tqdm,
            file=self.console.file,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar by the episodes of the step."""
        self._advance(self._episodes_done())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the logged metrics beside the bar, and a trajectory above it when one is due."""
        if self._bar is None or logs is None or "episodes" not in logs:
            return
        parts = [form.format(logs[name]) for name, form in _POSTFIX.items() if name in logs]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        done = self.num_before + int(logs["episodes"])
        self._advance(done)
        self._bar.refresh()
        self._print_if_due(done)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        self._close()

    def show_trajectory(self, row: LedgerRow) -> None:
        """Print a trajectory's steps above the bar."""
        with tqdm.external_write_mode(file=self.console.file):
            self.console.print(trajectory_table(row))

    def _episodes_done(self) -> int:
        return min(self.episodes_done(), self.num_episodes)

    def _advance(self, episodes: int) -> None:
        if self._bar is not None:
            self._bar.update(episodes - self._bar.n)

    def _tables_by(self, episodes: int) -> int:
        return 0 if self.table_episodes is None else episodes // self.table_episodes

    def _print_if_due(self, episodes: int) -> None:
        due = self._tables_by(episodes)
        if self.latest_trajectory is None or due <= self._tables_due:
            return
        row = self.latest_trajectory()
        if row is not None:
            self._tables_due = due
            self.show_trajectory(row)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _heading(row: LedgerRow) -> Text:
    return Text.assemble((_shown(row.title, 60), "bold"), f", episode {row.episode}, step {row.step}")


def _outcome(row: LedgerRow) -> Text:
    threshold = "none yet" if row.threshold is None else f"{row.threshold:+.4f}"
    return Text(
        f"reward {row.reward:+.4f} (query gain {row.query_gain:+.4f}, model gain {row.model_gain:+.4f}), "
        f"threshold {threshold}: {row.verdict.replace('_', ' ')}"
    )


def _literal(text: str, max_characters: int) -> Text:
    # A rich.Text is never parsed for markup or emoji codes, unlike a str.
    return Text(_shown(text, max_characters))


def _shown(text: str, max_characters: int) -> str:
    shown = escape_control_characters(text).strip()
    return shown if len(shown) <= max_characters else shown[: max_characters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def without_trainers_bar(callbacks: Iterable[TrainerCallback]) -> list[TrainerCallback]:
    """Leave out the Trainer's own bar, by exact type: a user's subclass stays, as does the printer without a bar."""
    return [item for item in callbacks if type(item) is not DEFAULT_PROGRESS_CALLBACK]
