"""``push`` against a hub on loopback: what goes, the card's metadata, private unless told, nothing without a yes."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.model_card import hub_datasets
from tests.command_line import Cli, assert_refused


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; repositories are private or public by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.key = "Bearer hf_" + "k" * 20


class Handler(BaseHTTPRequestHandler):
    """The few of the hub's paths that an upload takes."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def repository(self) -> str:
        return "/".join(self.path.partition("/models/")[2].split("/")[:2])

    def do_GET(self) -> None:
        name = self.repository().partition("?")[0]
        if self.headers.get("Authorization") != self.server.key:
            self.answer(401, {"error": "bad key"})
        elif name in self.server.repositories:
            self.answer(200, {"id": name, "private": self.server.repositories[name], "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.server.repositories.setdefault(name, private)
            self.answer(200, {"url": f"https://huggingface.co/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            self.server.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                200, {"success": True, "commitUrl": "https://huggingface.co/me/model/commit/1", "commitOid": "1" * 40}
            )
        else:
            self.answer(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HF_TOKEN", running.key.removeprefix("Bearer "))
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def run(config: Any, cli: Cli, tmp_path: Path) -> Path:
    """A finished run that was evaluated."""
    assert cli("fit", "--config", config("DPOModule"), "--trainer.log_every_n_steps", "1").returncode == 0
    return tmp_path / "run"


def test_the_subset_of_a_dataset_stands_apart_from_its_id(run: Path, hub: Hub, cli: Cli) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["dataset_name"] = "some/prompts:hard"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = cli("push", str(run), "me/model", "--yes")
    assert result.returncode == 0, result.stderr
    front = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    told = front["model-index"][0]["results"][0]["dataset"]
    assert told == {"name": "some/prompts:hard", "type": "some/prompts", "config": "hard"}
    stages = [{"dataset": "a/talks:all + rows (local)"}, {"dataset": "b/pairs"}, {"dataset": "a/talks:other"}]
    assert hub_datasets(stages) == ["a/talks", "b/pairs"]


def test_a_runs_model_goes_with_its_card_and_its_evaluation_and_is_private(run: Path, hub: Hub, cli: Cli) -> None:
    result = cli("push", str(run), "me/model", "--yes")
    assert result.returncode == 0, result.stderr
    assert hub.repositories == {"me/model": True}
    assert hub.commits == 1
    local = {str(file.relative_to(run / "final")) for file in (run / "final").rglob("*") if file.is_file()}
    assert set(hub.files) == local
    assert hub.files["model.safetensors"] == (run / "final" / "model.safetensors").read_bytes()
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    own = (run / "final" / "README.md").read_text()
    assert yaml.safe_load(own.split("---")[1]).items() <= front.items()
    assert card.split("---", 2)[2].strip() == own.split("---", 2)[2].strip()
    metrics = json.loads((run / "eval" / "epoch=0" / "metrics.json").read_text())
    told = {part["type"]: part["value"] for part in front["model-index"][0]["results"][0]["metrics"]}
    assert told["win_rate"] == metrics["win_rate"]
    assert told["average_reward"] == metrics["average_reward"]
    assert front["model-index"][0]["name"] == "model"
    assert f"{metrics['win_rate']:.1%}" in result.stdout
    assert "model.safetensors" in result.stdout


def test_an_evaluation_of_other_weights_is_not_told(run: Path, hub: Hub, cli: Cli) -> None:
    file = run / "eval" / "epoch=0" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_digest": "0" * 64}))
    result = cli("push", str(run / "final"), "me/model", "--yes")
    assert result.returncode == 0, result.stderr
    assert "without an evaluation" in result.stdout
    assert hub.files["README.md"] == (run / "final" / "README.md").read_bytes()


def test_a_public_repository_takes_a_word(run: Path, hub: Hub, cli: Cli) -> None:
    hub.repositories["me/open"] = False
    assert_refused(cli("push", str(run), "me/open", "--yes"), "me/open exists and is public; say --public")
    assert hub.commits == 0
    assert cli("push", str(run), "me/open", "--yes", "--public").returncode == 0
    assert cli("push", str(run), "me/new", "--yes", "--public").returncode == 0
    assert hub.repositories["me/new"] is False


@pytest.mark.parametrize(("answer", "commits"), [("y", 1), ("", 0), ("no", 0)])
def test_nothing_goes_without_a_yes(
    answer: str, commits: int, run: Path, hub: Hub, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(cli("push", str(run), "me/model"), "nobody can be asked here: say --yes")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert cli("push", str(run), "me/model").returncode == 0
    assert hub.commits == commits
    assert bool(hub.repositories) == bool(commits)


def test_what_cannot_be_uploaded_is_refused(
    hub: Hub, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    assert_refused(cli("push", str(folder), "me/model"), "final does not exist: name a finished run's folder")
    (folder / "config.json").write_text("{}")
    assert_refused(cli("push", str(folder), "me/model"), "is no export of a run")
    assert_refused(cli("push", str(folder), "me model"), "is no name of a repository")
    assert_refused(cli("push", str(folder), "model"), "user/model")
    hub.key = "Bearer another"
    (folder / "README.md").write_text("x")
    (folder / "lineage.yaml").write_text("{}")
    assert_refused(cli("push", str(folder), "me/model", "--yes"), "did not take it")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_refused(cli("push", str(folder), "me/model", "--yes"), "the hub at http://127.0.0.1:9 did not take it")
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(cli("push", str(folder), "me/model"), "set HF_TOKEN in the environment")
