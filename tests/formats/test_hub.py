"""Heads by their id on the hub; a local function replaces the download, since no test may use the network."""

import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from folders import write_model
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from published import write
from published_medusa import numbered, parts
from typer.testing import CliRunner

import headstart
from headstart import formats
from headstart.cli import app
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.engine.drafter_loading import folder_of, make
from headstart.speculation.heads_plan import load_plan
from headstart.target.loading import embedded, load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Repositories of the hub, by their id, as folders; `requests` records what was requested."""

    class Shared(dict):
        pass

    repositories = Shared()
    repositories.requests = []

    def download(repo_id, *, allow_patterns):
        repositories.requests.append((repo_id, tuple(allow_patterns)))
        if repo_id not in repositories:
            raise LocalEntryNotFoundError("the hub cannot be reached\nand so on")
        if isinstance(repositories[repo_id], Exception):
            raise repositories[repo_id]
        folder = tmp_path / "cache" / repo_id.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        for file in repositories[repo_id].iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return repositories


def heads_for(model_folder, folder):
    target_info = formats.describe_target(load_model(model_folder), load_tokenizer(model_folder))
    torch.manual_seed(0)
    formats.save(folder, Medusa(MedusaConfig(num_heads=2), target_info.hidden, target_info.vocab), target_info, {})
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    return folder


def test_heads_are_loaded_by_their_hub_id(shared, model_folder, tmp_path):
    shared["owner/heads"] = heads_for(model_folder, tmp_path / "source")
    llm = headstart.load(model_folder, drafter="owner/heads", device="cpu")
    plain = headstart.load(model_folder, drafter=None, device="cpu")
    assert llm.generate("the cat", max_tokens=8)[0].token_ids == plain.generate("the cat", max_tokens=8)[0].token_ids
    assert (llm.engine.drafter.name, llm.engine.drafter.depth) == ("medusa", 2)
    assert sorted(file.name for file in (tmp_path / "cache" / "owner--heads").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


def test_the_command_line_accepts_a_hub_id(shared, model_folder, tmp_path):
    shared["owner/heads"] = heads_for(model_folder, tmp_path / "source")
    command = ["generate", "the cat", "--model", str(model_folder), "--max-tokens", "8", "--raw"]
    fetched, plain = (CliRunner().invoke(app, [*command, "--drafter", name]) for name in ("owner/heads", "none"))
    assert (fetched.exit_code, fetched.stdout) == (0, plain.stdout)


def test_a_calibrated_plan_is_downloaded_with_the_heads(shared):
    shared["owner/hydra"] = embedded("hydra")
    assert load_plan(folder_of("owner/hydra", None)).trees


def test_an_existing_folder_takes_precedence_over_the_hub(shared, model_folder, tmp_path):
    heads_for(model_folder, tmp_path / "owner" / "heads")
    assert make("owner/heads", Target.load(model_folder, device="cpu")).name == "medusa"
    assert shared.requests == []


@pytest.mark.parametrize("name", ["heads", "./owner/heads", "/owner/heads", "a/b/c", "owner/heads:x", "owner/", "..//heads"])
def test_names_that_are_no_hub_id_are_never_requested(shared, model_folder, name):
    with pytest.raises(ValueError, match=r"is unknown; there are .* a folder of heads, heads on the hub as owner/name"):
        make(name, Target.load(model_folder, device="cpu"))
    assert shared.requests == []


def test_an_installed_drafter_and_a_method_are_never_requested_from_the_hub(shared, model_folder):
    target = Target.load(model_folder, device="cpu")
    assert make("lookup", target).name == "lookup"
    with pytest.raises(ValueError, match="comes with no medusa heads"):
        make("medusa", target)
    assert shared.requests == []


def not_found():
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (not_found(), "the hub has no repository of that name that you may see; check the name, or log in"),
        (None, "cannot be fetched from the hub: the hub cannot be reached; check the connection, or name a folder"),
        (ConnectionError("no route"), "cannot be fetched from the hub: no route; check the connection"),
    ],
    ids=["not there", "offline", "no route"],
)
@pytest.mark.parametrize("command", ["generate", "import"])
def test_a_failed_download_is_reported_in_one_sentence(shared, model_folder, answer, words, command):
    if answer is not None:
        shared["owner/heads"] = answer
    rest = {
        "generate": ["the cat", "--model", str(model_folder), "--drafter", "owner/heads"],
        "import": ["owner/heads", "--target", str(model_folder), "--out", "ours"],
    }
    result = CliRunner().invoke(app, [command, *rest[command]])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"owner/heads is no folder here, and {'it ' if 'fetched' in words else ''}{words}" in result.stderr


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "pytorch_model.bin"])
def test_published_heads_are_imported_by_their_hub_id(shared, tmp_path, file):
    target = write_model(tmp_path / "talker")
    shared["owner/medusa"] = write(tmp_path / "theirs", file, numbered(parts(2, 1)), base_model_name_or_path=str(target))
    result = CliRunner().invoke(app, ["import", "owner/medusa", "--target", str(target), "--out", "ours"])
    assert result.exit_code == 0, result.output
    assert formats.describe("ours").training["imported_from"] == "owner/medusa"
    wants_pickles = [any("*.bin" in patterns for patterns in asked) for _, *asked in shared.requests]
    assert wants_pickles == ([False] if file.endswith("safetensors") else [False, True])


def test_a_pickle_with_code_is_refused(shared, tmp_path, model_folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('run')",)

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    shared["owner/evil"] = tmp_path / "theirs"
    result = CliRunner().invoke(app, ["import", "owner/evil", "--target", str(model_folder), "--out", "ours"])
    assert result.exit_code == 2
    assert not (tmp_path / "ours").exists()
