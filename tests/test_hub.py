"""Publishing: into folders, and over HTTP to a small server that answers as the hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from huggingface_hub import ModelCard, constants

from emocircuits.errors import ArtefactError, InputError
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Ramp, Steerer, Term
from emocircuits.steering.hub import pull, push

COMMIT = "a" * 40


def steerer(**more: Any) -> Steerer:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return Steerer((Term("resid_post", (1, 2), vectors, 0.5),), "fear", **more)


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: create, preupload, commit, and resolve; behaviour is set on the server."""

    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b""
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.server.status:
            return self.reply(self.server.status)
        if self.path.endswith("/repos/create"):
            self.server.created = json.loads(body)
            name = self.server.created["name"]
            return self.reply(200, json.dumps({"url": f"{self.server.address}/someone/{name}"}).encode())
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.reply(200, json.dumps({"files": files}).encode())
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            made = {"commitOid": COMMIT, "commitUrl": f"{self.server.address}/someone/fear/commit/{COMMIT}"}
            return self.reply(200, json.dumps(made).encode())
        return self.reply(200)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.server.status:
            return self.reply(self.server.status, **self.server.headers)
        if "/resolve/main/" not in self.path:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        body = self.server.files.get(self.path.rpartition("/")[2])
        if body is None:
            return self.reply(404, X_Error_Code="EntryNotFound")
        return self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.seen, server.created, server.status, server.headers = {}, [], {}, 0, {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_local_folder_holds_the_file_and_the_card(tmp_path) -> None:
    model = zoo.build("llama")
    cost = {"coherent expression": 0.746, "perplexity": {"median": 25}, "note": "a|b"}
    made = steerer(fingerprint=fingerprint(model), cost=cost, provenance={"seed": 3})
    where = made.push_to_hub(tmp_path / "fear", licence="cc-by-4.0", base_model="org/tiny", card_text="Held out: yes.")
    assert where == str(tmp_path / "fear")
    assert sorted(p.name for p in (tmp_path / "fear").iterdir()) == ["README.md", "steerer.safetensors"]
    back = Steerer.from_pretrained(where)
    assert torch.equal(back.terms[0].vectors, made.terms[0].vectors)
    assert dict(back.provenance) == {"seed": 3, "licence": "cc-by-4.0"}
    assert "licence" not in made.provenance
    text = (tmp_path / "fear" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.library_name) == ("cc-by-4.0", "org/tiny", "emocircuits")
    assert "emocircuits" in data.tags
    for words in (
        "# fear",
        "Held out: yes.",
        "| add | resid_post | 1, 2 | 0.5 | all |",
        "0.746",
        "a\\|b",
        '{"median": 25}',
    ):
        assert words in text
    assert "What it costs" not in card_of(push(steerer(), tmp_path / "plain"))


def test_a_measured_cost_card_comes_with_its_plot(tmp_path) -> None:
    rate = {"estimate": 0.5, "low": 0.4, "high": 0.6}
    numbers = {"perplexity": 9.0, "repetition": 0.1, "kl_on_neutral": 0.2, "capability": 0.9, "example": "Run!"}
    cell = {"coherent": rate, "expression": rate, "degenerate": rate, **numbers}
    cells = [{"method": "none", "dose": 0.0, **cell}, {"method": "steered", "dose": 1.0, **cell}]
    cost = {
        "emotion": "fear",
        "model": "tiny",
        "strength": 0.5,
        "n_scenarios": 8,
        "judge": "j",
        "seed": 0,
        "cells": cells,
    }
    folder = push(steerer(cost=cost).when(Ramp(0, 1, 4)), tmp_path / "plain")
    assert "cost.svg" not in card_of(folder)  # with another control it has to be measured again
    folder = push(replace(steerer(cost=cost).when(Ramp(0, 1, 4)), cost=cost), tmp_path / "fear")
    text = card_of(folder)
    for words in ("\n# fear\n", "\n## fear: what it does and what it costs\n", "](cost.svg)", "all, Ramp |", "Run!"):
        assert words in text
    assert (tmp_path / "fear" / "cost.svg").read_text().startswith("<svg")


def card_of(folder: str) -> str:
    return (Path(folder) / "README.md").read_text()


def test_relative_folders_and_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    push(steerer(), "./fear")
    assert pull("./fear") == pull("fear") == pull("fear/steerer.safetensors")
    with pytest.raises(InputError, match="no other.safetensors"):
        pull("./fear", filename="other.safetensors")
    with pytest.raises(InputError, match="no steerer.safetensors in nowhere"):
        Steerer.from_pretrained("./nowhere")
    with pytest.raises(InputError, match="licence"):
        push(steerer(), "./fear", licence=" ")
    with pytest.raises(InputError, match="hub id"):
        pull("")
    (tmp_path / "fear" / "steerer.safetensors").write_text("x")
    with pytest.raises(ArtefactError):
        Steerer.from_pretrained("./fear")


def test_over_http_there_and_back(hub) -> None:
    address = steerer().push_to_hub("someone/fear", private=True, token="hf_secret")
    assert address == f"{hub.address}/someone/fear"
    assert hub.created["name"] == "fear"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert sorted(hub.files) == ["README.md", "steerer.safetensors"]
    assert {auth for path, auth in hub.seen if "someone" in path or "create" in path} == {"Bearer hf_secret"}
    back = Steerer.from_pretrained("someone/fear", token="hf_secret")
    assert torch.equal(back.terms[0].vectors, steerer().terms[0].vectors)
    assert back.provenance["licence"] == "mit"


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (404, {"X_Error_Code": "RepoNotFound"}, "has no someone/fear, or hides it"),
        (401, {"X_Error_Code": "GatedRepo"}, "is gated"),
        (401, {}, "does not let you use someone/fear; pass token="),
        (403, {}, "does not let you use someone/fear; pass token="),
    ],
)
def test_what_the_hub_says_to_a_download(hub, status: int, headers: dict[str, str], words: str) -> None:
    hub.status, hub.headers = status, headers
    with pytest.raises(InputError, match=words):
        pull("someone/fear")


def test_missing_files_revisions_names_and_rights(hub, monkeypatch) -> None:
    with pytest.raises(InputError, match="holds no steerer.safetensors"):
        pull("someone/fear")
    with pytest.raises(InputError, match="no revision 'v2'"):
        pull("someone/fear", revision="v2")
    with pytest.raises(InputError, match="no hub id"):
        pull("some one")
    hub.status = 403
    with pytest.raises(InputError, match="does not let you use someone/fear"):
        push(steerer(), "someone/fear", token="hf_secret")


def test_no_network_is_said_at_once(monkeypatch, tmp_path) -> None:
    import socket

    def refuse(*_args: Any) -> None:
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(sys.modules["emocircuits.models.load"], "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for act in (lambda: pull("someone/fear"), lambda: push(steerer(), "someone/fear")):
        with pytest.raises(InputError, match="cannot be reached"):
            act()
