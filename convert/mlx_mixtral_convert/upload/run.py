"""``upload``: a verified conversion into a repository of the hub."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from mlx_mixtral.arguments import as_path, check_callbacks, check_type, checked, shown
from mlx_mixtral.errors import HubError, InvalidRequestError
from mlx_mixtral.evaluation.report import SECTION_FILE
from mlx_mixtral.hub.failures import hub_errors, is_unreachable
from mlx_mixtral.model_names import repository_name
from mlx_mixtral_convert.report import json_object
from mlx_mixtral_convert.upload.card import model_card
from mlx_mixtral_convert.upload.described import Uploadable, describe, stated_licence

__all__ = ["UploadReport", "check_repository", "upload"]

CARD = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")


@dataclass(frozen=True)
class UploadReport:
    """What was uploaded, or with ``dry_run`` would be: ``files`` by name, ``card`` the text of README.md (None where the
    repository's own is kept), ``notes`` sentences about what the card lacks."""

    path: str
    repository: str
    url: str
    private: bool
    files: tuple[str, ...]
    nbytes: int
    card: str | None
    seconds: float
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return json_object(self)


@checked()
def upload(
    path: str | Path,
    repository: str,
    *,
    public: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
    report: str | Path | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verified: Callable[[], None] | None = None,
) -> UploadReport:
    """Put a conversion on the hub, with a model card made from what is known of it.

    It is verified first: every file's sha256 against ``conversion.json``, or a GGUF file's header against its length. Only
    files the conversion lists are uploaded, and nothing in ``path`` is changed. After an interruption the same call goes on:
    what the hub has already is not sent again.

    Example:
        upload("mixtral-4bit", "you/Mixtral-8x7B-4bit", report="mixtral-4bit-report")

    Args:
        path: a folder that ``convert`` or ``export`` wrote, or a GGUF file.
        repository: ``owner/name``, made if there is none.
        public: make the repository for everyone to see; one that exists keeps its visibility.
        base_model: the repository of the model it was made from; the one it was converted from when None.
        licence: the hub's name of the licence; when None that of ``source``, of the text beside the weights, or of the base
            model's own card.
        report: the folder ``mlx-mixtral report`` wrote: its measurements and plots join the card.
        source: the folder it was converted from, to read a licence from.
        overwrite: replace the repository's card, and other weights in it.
        dry_run: verify and make the card; ask the hub for nothing but the base model's licence, upload nothing.
        verified: called once the conversion was found sound, before anything is sent.

    Raises:
        CheckpointError: the conversion is not as it was written, or ``path`` is none.
        HubError: no token, no right to write, a repository with other weights, no connection.
        InvalidRequestError: a name that is no repository's, a report that is none.
        MissingDependencyError: the hub's client is not installed.
    """
    started = time.perf_counter()
    place = as_path("path", path)
    repository = check_repository("repository", repository)
    if base_model is not None:
        base_model = check_repository("base_model", base_model)
    check_type("licence", licence, (str, NoneType), "the hub's name of a licence, or None")
    check_callbacks(verified=verified)
    read = None if source is None else as_path("source", source)
    measured = _report_files(None if report is None else as_path("report", report))
    found = describe(place)
    if verified is not None:
        verified()
    notes: list[str] = []
    base = base_model or found.repository
    if base is None:
        notes.append(
            "the card names no base model because the source was not a hub repository; name one with --base-model"
        )
    licence = licence or _licence(found, place, read, base)
    if licence is None:
        notes.append("the card names no licence because none was found; name one with --license")
    section = measured.pop(SECTION_FILE).read_text(encoding="utf-8") if measured else None
    card: str | None = model_card(found, repository, base_model=base, licence=licence, section=section)
    files = {**found.files, **measured}
    url, private = f"https://huggingface.co/{repository}", not public
    if not dry_run:
        with _upload_errors(repository):
            url, private, kept = _send(found, repository, files, card, public=public, overwrite=overwrite)
        if kept:
            card = None
            notes.append(f"{repository} has a README.md, which was kept; use --overwrite to replace it")
        if public and private:
            notes.append(f"{repository} already existed and is private; change that in its settings")
        elif not public and not private:
            notes.append(f"{repository} already existed and is public")
    return UploadReport(
        path=str(path),
        repository=repository,
        url=url,
        private=private,
        files=tuple(sorted([*files, *([CARD] if card is not None else [])])),
        nbytes=sum(file.stat().st_size for file in files.values()),
        card=card,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
        dry_run=dry_run,
    )


def check_repository(argument: str, name: object) -> str:
    """``owner/name`` of what is written so, or as the address of a repository's page; raises InvalidRequestError otherwise."""
    if isinstance(name, str) and _REPOSITORY.fullmatch(found := repository_name(name)) is not None:
        return found
    raise InvalidRequestError(f"{argument} {shown(name)} is not a hub repository; write owner/name, with no revision")


def _report_files(folder: Path | None) -> dict[str, Path]:
    """A report's files by their names in the repository."""
    if folder is None:
        return {}
    if not (folder / SECTION_FILE).is_file():
        raise InvalidRequestError(f"{folder} has no {SECTION_FILE}; make one with mlx-mixtral report")
    plots = sorted(folder.glob("plots/*.png"))
    return {SECTION_FILE: folder / SECTION_FILE} | {f"plots/{path.name}": path for path in plots}


def _licence(found: Uploadable, place: Path, source: Path | None, base: str | None) -> str | None:
    folders = [source] if source is not None and source.is_dir() else []
    folders += [place] if place.is_dir() else []
    for folder in folders:
        if (stated := stated_licence(folder)) is not None:
            return stated
    if base is None:
        return None
    from huggingface_hub import HfApi

    # One that cannot be asked for leaves a gap in the card, and a note; what is wrong with the hub is said when uploading.
    with contextlib.suppress(Exception), hub_errors(base):
        data = HfApi().model_info(base).card_data
        value = None if data is None else data.get("license")
        return value if isinstance(value, str) else None
    return None


def _send(
    found: Uploadable, repository: str, files: dict[str, Path], card: str | None, *, public: bool, overwrite: bool
) -> tuple[str, bool, bool]:
    """Upload; the page, whether it is private, and whether the repository's own card was kept."""
    from huggingface_hub import HfApi, get_token

    api = HfApi(library_name="mlx-mixtral")
    if get_token() is None:
        raise HubError("uploading needs a token with write access; run `hf auth login`, or set HF_TOKEN")
    page = api.create_repo(repository, private=not public, exist_ok=True)
    info = api.model_info(repository)
    present = [item.rfilename for item in info.siblings or ()]
    # Shards of another model beside these would be loaded with them. GGUF files lie side by side.
    others = [name for name in present if name not in files and name.endswith(_WEIGHTS) and found.kind != "gguf"]
    if others and not overwrite:
        raise HubError(
            f"the repository has other weights ({others[0]}); give another name, or remove them with --overwrite"
        )
    keeps_card = CARD in present and not overwrite
    with tempfile.TemporaryDirectory(prefix="mlx-mixtral-upload-") as scratch:
        for name, path in files.items():
            link = Path(scratch) / name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        if card is not None and not keeps_card:
            (Path(scratch) / CARD).write_text(card, encoding="utf-8")
        api.upload_folder(
            repo_id=repository,
            folder_path=scratch,
            commit_message=f"Upload {found.kind} weights with mlx-mixtral",
            delete_patterns=others or None,
        )
    return str(page), bool(info.private), keeps_card


@contextlib.contextmanager
def _upload_errors(repository: str) -> Iterator[None]:
    """As ``hub_errors``, in the words of one who writes."""
    with hub_errors(repository):
        try:
            yield
        except HubError:
            raise
        except Exception as error:
            causes = list(_causes(error))
            statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
            status = next((status for status in statuses if isinstance(status, int)), None)
            if status == 401:
                raise HubError(
                    "the hub does not accept the token; run `hf auth login` again, or set HF_TOKEN"
                ) from error
            if status in (403, 404):
                raise HubError(
                    "the token has no write access there; use one that may write to that owner's repositories: "
                    "https://huggingface.co/settings/tokens"
                ) from error
            again = "repeat the command to continue where it stopped"
            if any(map(is_unreachable, causes)) or (status is not None and status >= 500):
                raise HubError(f"the hub cannot be reached or is failing; {again}") from error
            if status is not None:
                raise HubError(f"the hub answered with status {status}; {again}") from error
            raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of: the client wraps some of its own."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__
