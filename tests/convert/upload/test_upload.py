"""Conversions put on a hub of this machine: what arrives, what is refused first, and the card as the hub reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mlx_mixtral.errors import CheckpointError, HubError, InvalidRequestError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.upload import upload
from mlx_mixtral_convert.upload.run import _upload_errors
from tests.convert.export_support import add_tokenizer
from tests.convert.support import make_checkpoint
from tests.convert.upload.upload_server import REPOSITORY, UploadHub, run_uploads, serve_uploads


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("upload") / "source"))
    (folder / "LICENSE").write_text("\n    Apache License\n    Version 2.0, January 2004\n")
    return folder


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "mlx", recipe=Recipe(4))
    return tmp_path / "mlx"


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with serve_uploads() as running:
        yield running


def card_of(text: str) -> dict[str, Any]:
    """The card's metadata as the hub's client reads them, which are what YAML says."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def test_a_conversion_arrives_whole_and_private(converted: Path, hub: UploadHub, tmp_path: Path) -> None:
    (converted / ".hidden").write_text("mine")
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    (report,) = run_uploads(
        tmp_path / "home", hub, {"path": converted, "repository": REPOSITORY, "base_model": "mistralai/Base"}
    )
    assert hub.files is not None, report
    assert hub.private is True
    card = hub.files.pop("README.md").decode()
    assert hub.files == {name: data for name, data in before.items() if name != ".hidden"}
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == before
    assert report["notes"] == []
    assert report["files"] == sorted([*hub.files, "README.md"])
    assert card_of(card) == {
        "base_model": "mistralai/Base",
        "base_model_relation": "quantized",
        "library_name": "mlx",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mixtral", "mlx-mixtral"],
    }
    assert f"mlx-mixtral generate {REPOSITORY} -p" in card
    worst = max(json.loads(before["conversion.json"])["errors"].values(), key=lambda entry: entry["relative_rms"])
    assert f"{worst['relative_rms']:.2%}" in card


def test_an_upload_that_breaks_goes_on_with_what_is_missing(converted: Path, hub: UploadHub, tmp_path: Path) -> None:
    options = {"path": converted, "repository": REPOSITORY, "public": True}
    hub.breaks_after = 1
    (broken,) = run_uploads(tmp_path / "home", hub, options)
    assert broken["error"] == "HubError"
    assert "me/model: the hub answered with status 400; repeat the command" in broken["message"]
    assert hub.files == {}
    hub.breaks_after = None
    sent = hub.sent
    (report,) = run_uploads(tmp_path / "home", hub, options)
    assert hub.files is not None
    weights = {name: data for name, data in hub.files.items() if name.endswith(".safetensors")}
    assert hub.sent == sum(map(len, weights.values())) > sent > 0
    assert report["private"] is False


def test_a_broken_connection_is_one_line_however_deep_the_client_wraps_it() -> None:
    def send() -> None:
        try:
            raise ConnectionResetError
        except ConnectionResetError as error:
            raise RuntimeError("Error while uploading") from error

    with (
        pytest.raises(HubError, match=r"^me/model: the hub cannot be reached or .* repeat the command"),
        _upload_errors(REPOSITORY),
    ):
        send()


def test_a_hub_in_trouble_is_waited_for_not_blamed_on_the_token() -> None:
    error = RuntimeError("status 503")
    error.response = SimpleNamespace(status_code=503)  # type: ignore[attr-defined]
    with pytest.raises(HubError, match="or is failing; repeat the command"), _upload_errors(REPOSITORY):
        raise error


def test_nothing_is_sent_of_a_damaged_conversion(converted: Path, hub: UploadHub, tmp_path: Path) -> None:
    shard = next(converted.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (found,) = run_uploads(tmp_path / "home", hub, {"path": converted, "repository": REPOSITORY})
    assert found["error"] == "CheckpointError"
    assert f"{shard.name}: has sha256" in found["message"]
    assert hub.writes == []


def test_tokens_that_are_missing_wrong_or_too_weak(converted: Path, hub: UploadHub, tmp_path: Path) -> None:
    options = {"path": converted, "repository": REPOSITORY}
    (found,) = run_uploads(tmp_path / "home", hub, options, token=None)
    assert found["error"] == "HubError"
    assert "run `hf auth login`" in found["message"]
    assert hub.writes == []
    for status, message in ((401, "does not accept the token; run `hf auth login`"), (403, "no write access")):
        hub.status = status
        (found,) = run_uploads(tmp_path / "home", hub, options)
        assert found["error"] == "HubError"
        assert message in found["message"]
        assert "\n" not in found["message"]


def test_what_is_in_the_repository_already(converted: Path, hub: UploadHub, tmp_path: Path) -> None:
    hub.files, hub.private = {"README.md": b"# Mine", "model-00001-of-00009.safetensors": b"other"}, False
    options = {"path": converted, "repository": REPOSITORY}
    (found,) = run_uploads(tmp_path / "home", hub, options)
    assert "has other weights (model-00001-of-00009.safetensors)" in found["message"]
    assert len(hub.files) == 2
    del hub.files["model-00001-of-00009.safetensors"]
    (found,) = run_uploads(tmp_path / "home", hub, options)
    assert hub.files["README.md"] == b"# Mine"
    assert "was kept" in " ".join(found["notes"])
    assert "already existed and is public" in " ".join(found["notes"])
    hub.files["other.safetensors"] = b"other"
    run_uploads(tmp_path / "home", hub, options | {"overwrite": True})
    assert "other.safetensors" not in hub.files
    assert hub.files["README.md"].startswith(b"---\n")


def test_a_gguf_file_and_its_card(source: Path, hub: UploadHub, tmp_path: Path) -> None:
    export(source, tmp_path / "m.gguf", to="gguf", type="Q4_0")
    options = {"path": tmp_path / "m.gguf", "repository": REPOSITORY, "base_model": "mistralai/Base"}
    (report,) = run_uploads(tmp_path / "home", hub, options)
    assert hub.files is not None
    assert sorted(hub.files) == ["README.md", "m.gguf"]
    found = card_of(hub.files["README.md"].decode())
    # The licence is asked of the hub's own card of the base model.
    assert (found["license"], found["base_model_relation"], found["library_name"]) == (
        "apache-2.0",
        "quantized",
        "gguf",
    )
    assert f"--hf-repo {REPOSITORY} --hf-file m.gguf" in report["card"]
    (tmp_path / "short.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-100])
    hub.writes.clear()
    (found,) = run_uploads(tmp_path / "home", hub, options | {"path": tmp_path / "short.gguf"})
    assert found["error"] == "CheckpointError"
    assert hub.writes == []


def test_a_report_joins_the_card_and_gaps_are_said(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "perplexity.png").write_bytes(b"png")
    (folder / "README-section.md").write_text("## Evaluation of it\n\n![p](plots/perplexity.png)\n")
    (converted / "LICENSE").unlink()
    manifest = json.loads((converted / "conversion.json").read_text())
    del manifest["files"]["LICENSE"]
    (converted / "conversion.json").write_text(json.dumps(manifest))
    found = upload(converted, REPOSITORY, report=folder, dry_run=True)
    assert found.card is not None
    assert found.card.endswith("## Evaluation of it\n\n![p](plots/perplexity.png)\n")
    assert "plots/perplexity.png" in found.files
    assert "README-section.md" not in found.files
    assert "license" not in card_of(found.card)
    assert ["--base-model" in note or "--license" in note for note in found.notes] == [True, True]


def test_an_exported_folder_of_floats_is_no_quantisation(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "hf", to="hf")
    card = upload(tmp_path / "hf", REPOSITORY, base_model="mistralai/Base", dry_run=True).card
    assert card is not None
    found = card_of(card)
    assert "base_model_relation" not in found
    assert found["library_name"] == "transformers"


def test_a_card_names_the_adapters_that_were_fused_in(converted: Path) -> None:
    manifest = json.loads((converted / "conversion.json").read_text())
    lora = {"name": "someone/lora_*x*", "kind": "PEFT", "scale": 0.5, "fingerprint": "0" * 64}
    manifest["adapters"] = [lora, {"name": "b", "kind": "mlx-lm", "scale": 1.0}, "nonsense", {"scale": None}]
    (converted / "conversion.json").write_text(json.dumps(manifest))
    card = upload(converted, REPOSITORY, base_model="mistralai/Base", dry_run=True).card
    assert card is not None
    shown = r"someone/lora\_\*x\* (PEFT, scale 0.5), b (mlx-lm, scale 1)"
    assert f"With LoRA adapters fused into the weights: {shown}." in card
    assert card_of(card)["base_model_relation"] == "finetune"


def test_a_hub_source_is_the_base_model_and_odd_names_stay_text(converted: Path) -> None:
    manifest = json.loads((converted / "conversion.json").read_text())
    manifest["source"] |= {"name": "mistralai/Base", "revision": "0" * 40}
    (converted / "conversion.json").write_text(json.dumps(manifest))
    card = upload(converted, REPOSITORY, licence="other: [x]", dry_run=True).card
    assert card is not None
    assert (card_of(card)["base_model"], card_of(card)["license"]) == ("mistralai/Base", "other: [x]")
    manifest["source"] |= {"name": "evil\n---\nlicense: mit", "revision": "0"}
    (converted / "conversion.json").write_text(json.dumps(manifest))
    card = upload(converted, REPOSITORY, dry_run=True).card
    assert card is not None
    assert "base_model" not in card_of(card)
    assert card_of(card)["license"] == "apache-2.0"


def test_requests_that_cannot_be(converted: Path, source: Path, tmp_path: Path) -> None:
    for name in ("model", "me/model@main", "https://huggingface.co/me/model/tree/v1"):
        with pytest.raises(InvalidRequestError, match="write owner/name"):
            upload(converted, name, dry_run=True)
    with pytest.raises(InvalidRequestError, match=r"has no README-section\.md"):
        upload(converted, REPOSITORY, report=tmp_path, dry_run=True)
    with pytest.raises(CheckpointError, match=r"has no conversion\.json"):
        upload(source, REPOSITORY, dry_run=True)
    with pytest.raises(CheckpointError, match="no such folder or file"):
        upload(tmp_path / "none", REPOSITORY, dry_run=True)
