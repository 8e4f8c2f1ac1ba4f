"""What of a run goes to the Hub: the model in its folder and, where ``hub_strategy`` says so, the newest checkpoint."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy


def start_pushes(
    args: TrainingArguments, repo_id: str, output_dir: Path, checkpoint: Path, message: str
) -> list[Future[CommitInfo]]:
    """Begin to upload in the background.

    Args:
        args: token, revision and strategy.
        repo_id: the repository, ``namespace/name``.
        output_dir: the run's folder. What begins with an underscore stays here: it is being written, or was set aside.
        checkpoint: a complete one.
        message: of the commit.
    """

    def upload(
        folder: Path, message: str, path_in_repo: str | None = None, ignore_patterns: list[str] | None = None
    ) -> Future[CommitInfo]:
        return HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            token=args.hub_token,
            run_as_future=True,
            revision=args.hub_revision,
            path_in_repo=path_in_repo,
            ignore_patterns=ignore_patterns,
        )

    uploads = [upload(output_dir, message, ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"])]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        uploads.append(upload(checkpoint, f"{message}, checkpoint", path_in_repo=place))
    return uploads
