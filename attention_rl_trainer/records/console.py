"""Trajectories and evaluations into tables, and logged metrics into progress in episodes (design §10).

On a terminal and in a notebook progress is a bar; elsewhere, as in a log, a line now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.summary import escape_control_characters

_FIRST_FIGURES = ("reward", "query_gain", "model_gain", "order_gain")
_NUM_LINES = 50
"""In the log of a whole run."""
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


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """Lay out the figures of an evaluation, as `AttentionGuidedRLTrainer.evaluate` returns them.

    The reward and its parts come first; the epoch, which the Trainer adds to every log, is left out, since a run counts
    episodes.
    """
    values = {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "epoch"}
    episodes = values.pop("episodes", None)
    counted = "" if episodes is None else f", {episodes:.0f} trajectories"
    table = Table(title=Text(f"{title}{counted}", style="bold"), title_justify="left")
    table.add_column("figure, as in docs/metrics.md", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name in sorted(values, key=lambda name: name not in _FIRST_FIGURES):
        table.add_row(Text(name), f"{values[name]:.4f}")
    return table


class EpisodeProgressCallback(TrainerCallback):
    """Progress that counts episodes, with an occasional table of one trajectory above it.

    A step of the Trainer is a whole batch of episodes. Reward, kept fraction and query gain are beside the bar; where
    the console is neither a terminal nor a notebook, there is a line at every fiftieth of the run instead. Nothing is
    drawn outside the local main process. It replaces the Trainer's own bar, which counts steps: remove
    `transformers.trainer_callback.ProgressCallback` when this one is added. `disable_tqdm=True` hides bar and lines and
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
        self._is_shown = False
        """Whether anything is shown in this process."""
        self._lines_every: int | None = None
        """Episodes between two lines, where lines are shown."""
        self._last_line = 0
        self._tables_due = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar, at the episodes already done when a run is resumed."""
        self._close()
        if not state.is_local_process_zero:
            return
        done = self._episodes_done()
        self._is_shown = True
        self._tables_due = self._tables_by(done)
        has_bar = self.console.is_terminal or self.console.is_jupyter
        self._last_line = done
        self._lines_every = None if has_bar or args.disable_tqdm else max(1, self.num_episodes // _NUM_LINES)
        if has_bar:
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
        """Move the bar by the episodes of the step; what comes before the first one logs no episodes."""
        done = self._episodes_done()
        self._advance(done)
        if done <= self.num_before:
            self._print_line_if_due(done, "warm start")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the logged metrics beside the bar, and a trajectory above it when one is due."""
        if not self._is_shown or logs is None or "episodes" not in logs:
            return
        figures = ", ".join(form.format(logs[name]) for name, form in _POSTFIX.items() if name in logs)
        done = self.num_before + int(logs["episodes"])
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._advance(done)
            self._bar.refresh()
        self._print_line_if_due(done, figures)
        self._print_if_due(done)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        self._close()
        self._is_shown = False

    def show_trajectory(self, row: LedgerRow) -> None:
        """Print a trajectory's steps above the bar."""
        with tqdm.external_write_mode(file=self.console.file):
            self.console.print(trajectory_table(row))

    def _episodes_done(self) -> int:
        return min(self.episodes_done(), self.num_episodes)

    def _advance(self, episodes: int) -> None:
        if self._bar is not None:
            self._bar.update(episodes - self._bar.n)

    def _print_line_if_due(self, episodes: int, figures: str) -> None:
        every = self._lines_every
        if every is None or episodes == self._last_line:
            return
        if episodes // every == self._last_line // every and episodes < self.num_episodes:
            return
        self._last_line = episodes
        line = f"episode {episodes}/{self.num_episodes}"
        self.console.print(Text(f"{line}: {figures}" if figures else line), soft_wrap=True)

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
    """Leave out the Trainer's own bar, by exact type.

    A user's subclass stays, as do the printer without a bar and the table of a notebook.
    """
    return [item for item in callbacks if type(item) is not ProgressCallback]
