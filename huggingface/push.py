"""`python -m huggingface.push folder=FOLDER repo=OWNER/NAME`: a model folder to the Hub, with a model card.

The folder goes up as it is, without the training state in state/, in one commit. A README.md in it is the
model card; without one, a card is written from its config: what was expanded and how, sizes, how to load it.
`dry_run=true` shows the card and the list of files, and needs no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError  # of whichever HTTP library the Hub's client uses
from huggingface_hub.utils import HFValidationError, validate_repo_id

from huggingface.card import write_card
from models.command_line import run_command

# training state, the Hub's own marks in a downloaded folder, and the history of a cloned one
NOT_PUSHED = ("state", ".cache", ".git")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class PushArguments:
    """Push a model folder to the Hugging Face Hub.

    python -m huggingface.push folder=FOLDER repo=OWNER/NAME [key=value ...]

    folder=FOLDER     a model folder: from save_pretrained, a ckpt_N folder, or an exported one
    repo=OWNER/NAME   the repository; made when there is none
    private=true      make it private (true); a repository that exists stays as it is
    base_model=ID     the model it was trained from, for the card
    license=ID        for the card, as the Hub spells it (apache-2.0, mit, ...)
    message=TEXT      of the commit
    dry_run=true      show what would be pushed, and push nothing
    """

    folder: str
    repo: str
    private: bool = True
    base_model: str | None = None
    license: str | None = None
    message: str = "Upload model"
    dry_run: bool = False


def files_to_push(folder: Path) -> list[Path]:
    """Files of a model folder, by path inside it.

    Raises:
        ValueError: it is no model folder.
    """
    if not (folder / "config.json").is_file() or not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ValueError(f"{folder} is no model folder: it needs config.json and weights")
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if file.parts[0] not in NOT_PUSHED and file.suffix not in (".tmp", ".pyc")]


def push(arguments: PushArguments) -> None:
    folder = Path(arguments.folder)
    try:
        validate_repo_id(arguments.repo)
    except HFValidationError as error:
        raise ValueError(f"repo={arguments.repo!r}: {error}") from None
    if "/" not in arguments.repo:
        raise ValueError(f"repo={arguments.repo!r} must be OWNER/NAME")
    files = files_to_push(folder)
    card = None if Path("README.md") in files else write_card(folder, arguments.repo, card_data(arguments))

    total = sum((folder / file).stat().st_size for file in files)
    print(
        f"{arguments.repo}: {len(files)} files, {total / 1e9:.3f} GB, {'' if card else 'its own '}model card"
    )
    for file in files:
        print(f"  {file}  {(folder / file).stat().st_size:,} bytes")
    if arguments.dry_run:
        print(f"\n{card}\ndry run: nothing was pushed" if card else "\ndry run: nothing was pushed")
        return
    operations = [CommitOperationAdd(str(file), folder / file) for file in files]
    if card:
        operations.append(CommitOperationAdd("README.md", card.encode()))
    print(f"pushed: {_commit(arguments, operations)}")


def card_data(arguments: PushArguments) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=arguments.base_model,
        license=arguments.license,
        tags=["linear-rnn", "statex"],
    )


def _commit(arguments: PushArguments, operations: list[CommitOperationAdd]) -> str:
    api = HfApi()
    try:
        api.create_repo(arguments.repo, private=arguments.private, exist_ok=True)
        return api.create_commit(arguments.repo, operations, commit_message=arguments.message).commit_url
    except (HTTPError, OSError) as error:  # no network, no login, no right to write
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"nothing was pushed to {arguments.repo}: {reason[:300]}. Check the network, and log in with "
            "`hf auth login` (or HF_TOKEN) using a token that may write there"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PushArguments, push, argv)


if __name__ == "__main__":
    raise SystemExit(main())
