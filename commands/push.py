"""``push``: upload a run's model or adapter with its card, after showing what would go; private unless told."""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from callbacks.evaluation.result import EvaluationResult
from callbacks.hugging_face_export import ADAPTER, is_export
from commands import options
from commands.comparison.runs import Run, read_run
from core.errors import ConfigurationError
from core.plain import loaded_file
from core.secrets import redact
from core.text import printable, shown
from lightning_modules.models.adapter_files import CONFIG

CARD = "README.md"
FIGURES = ("win_rate", "average_reward", "reward_improvement", "length_controlled_win_rate", "length_ratio")


class Upload(NamedTuple):
    """What goes where."""

    folder: Path
    files: list[Path]
    card: str
    headline: EvaluationResult | None
    """The evaluation of these weights, which the card's metadata tell."""


def run() -> None:
    """Parse the command line, show, ask, and upload."""
    own = options.push().parse_args(sys.argv[1:])
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ConfigurationError("push needs a key of the hub that may write: set HF_TOKEN in the environment")
    check_repo(own.repo)
    upload = collected(own.directory, own.repo, adapter=own.adapter)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    private = state_of(api, own.repo)
    if private is False and not own.public:
        raise ConfigurationError(f"{own.repo} exists and is public; say --public, or name another repository")
    show(upload, own.repo, public=own.public, is_new=private is None)
    if not own.yes and not agreed():
        print("nothing was uploaded")
        return
    print(f"uploaded: {shown(uploaded(api, upload, own.repo, public=own.public))}")


def check_repo(repo: str) -> None:
    """Raise a ConfigurationError for what can be no repository's name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigurationError(f"{repo!r} is no name of a repository ({str(error).splitlines()[0]})") from error
    if "/" not in repo:
        raise ConfigurationError(f"{repo!r} lacks whose repository it is to be: user/{repo}")


def collected(directory: Path, repo: str, *, adapter: bool) -> Upload:
    """The files of an export and its card, with the headline of the run's evaluation where that is of these weights.

    Raises:
        ConfigurationError: If there is no export.
    """
    folder = exported(directory, adapter=adapter)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not (folder / CARD).is_file() or not is_export(folder):
        raise ConfigurationError(f"{folder} is no export of a run (it has no {CARD} or lineage); finish the training")
    found = read_run(folder.parent) if (folder.parent / "config.yaml").is_file() else None
    headline = None if found is None or is_adapter(folder) else headline_of(found)
    card = (folder / CARD).read_text("utf-8")
    if headline is not None and found is not None:
        card = with_results(card, headline, name=repo, dataset=evaluated_on(found))
    return Upload(folder, files, card, headline)


def exported(directory: Path, *, adapter: bool) -> Path:
    """The folder to upload: of a run's the model's or the adapter's."""
    if (directory / "config.json").is_file() or is_adapter(directory):
        return directory
    options = loaded_file(directory / "config.yaml") if (directory / "config.yaml").is_file() else {}
    final = str((options.get("export") or {}).get("directory") or "final")
    inside = directory / (ADAPTER if adapter else final)
    if not inside.is_dir():
        other = "" if adapter or not (directory / ADAPTER).is_dir() else f"; it has {ADAPTER}/ (--adapter)"
        raise ConfigurationError(f"{inside} does not exist: name a finished run's folder, or an export's{other}")
    return inside


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def headline_of(found: Run) -> EvaluationResult | None:
    """The run's evaluation, where it is valid and of the weights that are uploaded."""
    result = found.headline
    same = result is not None and result.valid and result.model_digest in (None, found.final_digest)
    return result if same else None


def evaluated_on(found: Run) -> str:
    """The dataset of the evaluation's prompts, as the run's options name it."""
    options: Any = yaml.safe_load(found.config)
    name = (options.get("evaluation") or {}).get("dataset_name") if isinstance(options, dict) else None
    return Path(name).name if isinstance(name, str) and Path(name).exists() else str(name or "held-out prompts")


def with_results(card: str, result: EvaluationResult, *, name: str, dataset: str) -> str:
    """The card with the evaluation's figures as metadata that the hub reads."""
    loaded = ModelCard(card, ignore_metadata_errors=True)
    low, high = result.win_rate_ci
    identity, _, subset = dataset.partition(":")
    source = f"against {result.reference}, judged by {result.reward_source}"
    told = {"win_rate": f"win rate {source}, 95 % interval {low:.3f} to {high:.3f}, {result.prompts} prompts"}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=identity,
            dataset_name=dataset,
            dataset_config=subset or None,
            metric_type=figure,
            metric_value=value,
            metric_name=told.get(figure, f"{figure.replace('_', ' ')} {source}"),
        )
        for figure in FIGURES
        if (value := getattr(result, figure)) is not None and value == value  # NaN is no result
    ]
    loaded.data["model-index"] = eval_results_to_model_index(name.rpartition("/")[2], results)
    return str(loaded)


def state_of(api: HfApi, repo: str) -> bool | None:
    """Whether the repository is private; None where there is none.

    Raises:
        ConfigurationError: If the hub does not answer, or refuses the key.
    """
    try:
        return bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # of whichever client the hub's library has
        raise refused(api, error) from error


def refused(api: HfApi, error: Exception) -> ConfigurationError:
    """What the hub said, with what to do."""
    told = printable(redact(str(error).strip().splitlines()[0]))
    return ConfigurationError(f"the hub at {api.endpoint} did not take it ({told}); check HF_TOKEN and the name")


def show(upload: Upload, repo: str, *, public: bool, is_new: bool) -> None:
    """Print what would go."""
    kind = f"{'new, ' if is_new else ''}{'public' if public else 'private'}"
    print(f"{shown(str(upload.folder))} -> {repo} ({kind})")
    for file in upload.files:
        print(f"  {shown(str(file.relative_to(upload.folder))):40} {file.stat().st_size / 1e6:12,.2f} MB")
    if upload.headline is None:
        print("  without an evaluation: the run has none of these weights")
    else:
        rate, (low, high) = upload.headline.win_rate, upload.headline.win_rate_ci
        print(f"  with its win rate of {rate:.1%} [{low:.1%}, {high:.1%}] in the card's metadata")


def agreed() -> bool:
    """Whether somebody says yes.

    Raises:
        ConfigurationError: If nobody can be asked.
    """
    if not sys.stdin.isatty():
        raise ConfigurationError("nobody can be asked here: say --yes to upload")
    try:
        return input("upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def uploaded(api: HfApi, upload: Upload, repo: str, *, public: bool) -> str:
    """Upload in one commit, and say where it is.

    Raises:
        ConfigurationError: If the hub does not take it.
    """
    operations = [
        CommitOperationAdd(
            path_in_repo=str(file.relative_to(upload.folder)),
            path_or_fileobj=upload.card.encode() if file == upload.folder / CARD else file,
        )
        for file in upload.files
    ]
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.create_commit(repo, operations=operations, commit_message=f"Upload {upload.folder.name}")
    except Exception as error:  # of whichever client the hub's library has
        raise refused(api, error) from error
    return str(commit.commit_url)
