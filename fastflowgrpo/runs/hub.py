"""Uploading a checkpoint and its model card to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.weights import FULL, LORA
from fastflowgrpo.runs.model_card import CARD, PICTURES, PLACE, write_card

UPLOADED = (CARD, *PICTURES, LORA, f"{FULL}/*")


def push(run: Path, checkpoint: Path, repository: str, private: bool | None = None) -> str:
    """Upload the weights of a checkpoint, its card and its pictures, and nothing else of the run.

    A card that is there already is kept as it is, with what its author wrote into it.

    Args:
        repository: OWNER/NAME on the hub; made if there is none.
        private: whether it is private if it is made; None for its owner's default.

    Returns:
        The repository's address.

    Raises:
        UserError: it did not work; says why, and how to try again.
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
    except Exception as error:  # of the network, the hub, the disk: none of them may cost the run
        raise UserError(
            f"{checkpoint} was not pushed to {repository}: {type(error).__name__}: {error}; "
            f"it is safe where it is, try again with: python -m fastflowgrpo.push {run} {repository}"
        ) from error
    return str(address)


def check_push(repository: str) -> None:
    """Raises UserError if a push to a repository would fail for its name, or for want of a login."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"hub_model_id: {error}") from error
    if get_token() is None:
        raise UserError(f"hub_model_id: to push to {repository} log in with `hf auth login`, or set HF_TOKEN")
