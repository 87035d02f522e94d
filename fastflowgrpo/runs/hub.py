"""Uploading a checkpoint and its model card to the Hugging Face Hub."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.weights import FULL, FULL_2, LORA, LORA_2
from fastflowgrpo.runs.model_card import CARD, PICTURES, PLACE, write_card

UPLOADED = (CARD, *PICTURES, LORA, LORA_2, f"{FULL}/*", f"{FULL_2}/*")


def push(run: Path, checkpoint: Path, repository: str, private: bool | None = None) -> str:
    """Upload the weights of a checkpoint, its card and its pictures, and nothing else.

    An existing card keeps its text, so that authors can edit it before the push.

    Args:
        run: directory of the run.
        checkpoint: folder of one of its checkpoints.
        repository: OWNER/NAME on the hub; created if it does not exist.
        private: whether a new repository is private; None takes its owner's default.

    Returns:
        The address of the repository.

    Raises:
        UserError: the upload failed. The message says why, and how to try again.
    """
    card = checkpoint / CARD
    if not card.is_file():
        write_card(run, checkpoint)
    card.write_text(card.read_text(encoding="utf-8").replace(PLACE, repository), encoding="utf-8")
    hub = HfApi(library_name="fastflowgrpo")
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=checkpoint,
            allow_patterns=list(UPLOADED),
            commit_message=f"{checkpoint.name} of FastFlowGRPO",
        )
    except Exception as error:  # whatever fails in the network, the hub or the disk, the run must go on
        raise UserError(
            f"{checkpoint} was not pushed to {repository}: {type(error).__name__}: {error}; "
            f"the weights are safe in that folder, try again with: python -m fastflowgrpo.push {run} {repository}"
        ) from error
    return str(address)


def publish(config: Config, checkpoint: Path) -> None:
    """Write a model card into a checkpoint, and push both to the hub if `hub_model_id` is set.

    The run is saved already: a push that fails is a warning that says how to push again.
    """
    run, card = Path(config.output_dir), checkpoint / CARD
    print(f"{'card':8} {card if card.is_file() else write_card(run, checkpoint)}")
    if config.hub_model_id is not None:
        try:
            print(f"{'hub':8} {push(run, checkpoint, config.hub_model_id, config.hub_private)}")
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)


def check_push(repository: str) -> None:
    """Check the name of a repository, and that there is a login, before anything is pushed.

    Raises:
        UserError: a push would fail.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"hub_model_id: {error}") from error
    if get_token() is None:
        raise UserError(f"hub_model_id: to push to {repository} log in with `hf auth login`, or set HF_TOKEN")
