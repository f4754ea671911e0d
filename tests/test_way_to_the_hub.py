"""Bad proxies, tokens, names, endpoints and caches: one line each, and nothing is created or half sent."""

import errno
import hashlib
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from helpers import ROOT, write_shard
from huggingface_hub import constants
from loopback_hub import TOKEN, LoopbackHub

import upload_hf
from model import GPT, GPTConfig
from pre_tokens import fetch_tokens_hf, sources, transfer_tokens_hf
from support import hellaswag_data
from support import hub as hub_module
from support.cli import UserError

REPO = "ann/words"
SHARD = "words_val_000000.npy"
Train = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub with a data set; the client is made anew, with the environment that a test sets."""
    with LoopbackHub() as running:
        running.patch(monkeypatch, tmp_path)
        running.put(REPO, {SHARD: write_shard(tmp_path / SHARD, 2000).read_bytes()}, "dataset")
        monkeypatch.delenv("NO_PROXY")
        yield running
        huggingface_hub.close_session()


def fetch(tmp_path: Path) -> None:
    fetch_tokens_hf.fetch(REPO, tmp_path / "back")


def upload_shards(monkeypatch: pytest.MonkeyPatch, folder: Path, repo_id: str) -> None:
    monkeypatch.setattr("sys.argv", ["transfer", "--folder", str(folder), "--repo-id", repo_id])
    transfer_tokens_hf.main()


# ---------------------------------------------------------------- proxies


class Socks5(socketserver.BaseRequestHandler):
    """A SOCKS5 proxy (RFC 1928) without a password, for one connection."""

    seen: list[tuple[str, int]]  # where clients wanted to go

    def handle(self) -> None:
        client = self.request
        client.recv(2 + client.recv(2, socket.MSG_PEEK)[1])  # the ways to log in that it offers
        client.sendall(b"\x05\x00")
        kind = client.recv(4)[3]
        host = socket.inet_ntoa(client.recv(4)) if kind == 1 else client.recv(client.recv(1)[0]).decode()
        port = int.from_bytes(client.recv(2), "big")
        self.seen.append((host, port))
        with socket.create_connection((host, port)) as target:
            client.sendall(b"\x05\x00\x00\x01" + bytes(6))
            back = threading.Thread(target=self.copy, args=(target, client), daemon=True)
            back.start()
            self.copy(client, target)
            back.join()

    @staticmethod
    def copy(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(2**16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def socks() -> Iterator[socketserver.ThreadingTCPServer]:
    handler = type("Handler", (Socks5,), {"seen": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks"])  # the last is what GNOME writes
@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
def test_shards_come_through_a_socks_proxy(
    hub: LoopbackHub, socks: socketserver.ThreadingTCPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scheme: str, name: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, f"{scheme}://127.0.0.1:{socks.server_address[1]}/")
    fetch(tmp_path)
    assert (tmp_path / "back" / SHARD).read_bytes() == hub.repo(REPO, "dataset").files[SHARD]
    port = hub.server.server_port
    assert set(socks.RequestHandlerClass.seen) == {("127.0.0.1", port), ("localhost", port)}


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks4://ann:secret@127.0.0.1:9"), ("https_proxy", "http://[::1"), ("HTTP_PROXY", "://")],
)
def test_an_unusable_proxy_is_named_without_its_password(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{name}: no way to the Hub \(.+\): correct or unset$") as caught:
        fetch(tmp_path)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "back").exists() and not hub.requests


def test_a_failed_connection_names_the_variables_that_led_there(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "127.0.0.1:9")
    message = r"the Hub cannot be reached \(ConnectError: .*refused; set: .*HTTP_PROXY.*\): use --preset demo"
    with pytest.raises(UserError, match=message):
        fetch(tmp_path)


def test_missing_certificates_are_named(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    with pytest.raises(UserError, match=r"^SSL_CERT_FILE: no way to the Hub"):
        fetch(tmp_path)


# ---------------------------------------------------------------- other variables


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "https//x", "ftp://x", "http://", "http://x:port"])
def test_an_endpoint_that_is_not_an_address_is_refused(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for _ in range(2):  # and still there for the next attempt
        with pytest.raises(UserError, match=f"^HF_ENDPOINT {endpoint}: not of the form https://HOST"):
            fetch(tmp_path)


@pytest.mark.parametrize("name", hub_module.TIMEOUTS)
def test_a_timeout_that_is_not_a_number_is_refused(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "ten")
    with pytest.raises(UserError, match=f"^{name} ten: not a whole number of seconds"):
        fetch(tmp_path)


def test_no_script_imports_the_client_before_the_environment_is_checked() -> None:
    scripts = (
        "train_gpt2, generate, upload_hf, dataloader, pre_tokens.handle_tokens, pre_tokens.transfer_tokens_hf"
    )
    code = f"import sys, {scripts}; assert 'huggingface_hub.constants' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


def test_blank_variables_count_as_unset(hub: LoopbackHub, tmp_path: Path) -> None:
    code = f"""if True:
        from pathlib import Path
        from pre_tokens import fetch_tokens_hf
        fetch_tokens_hf.fetch({REPO!r}, Path({str(tmp_path / "back")!r}))
        from huggingface_hub import constants
        print(constants.HF_HOME)
    """
    variables = {**os.environ, "HF_ENDPOINT": f" {hub.endpoint}/ ", "HF_HUB_ETAG_TIMEOUT": "", "HF_HOME": " "}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "huggingface"
    assert (tmp_path / "back" / SHARD).exists()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "token", ["hf_…", f"{TOKEN}\u200b", "hf_loop\u00a0back", f'"{TOKEN}"', f"Bearer {TOKEN}", "hf_loop back"]
)
@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file"])
def test_a_token_with_stray_characters_is_refused_and_not_shown(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, name: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    if name == "file":
        file = tmp_path / "token"
        file.write_text(token, encoding="utf-8")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(file))
        name = str(file)
    else:
        monkeypatch.setenv(name, token)
    with pytest.raises(UserError, match=f"^{name}: not a token: paste it anew") as caught:
        fetch(tmp_path)
    assert token not in str(caught.value)
    assert not hub.requests and not (tmp_path / "back").exists()


def test_blanks_around_a_token_do_no_harm(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    fetch(tmp_path)
    assert {headers["authorization"] for _, path, headers in hub.requests if "/api/" in path} == {
        f"Bearer {TOKEN}"
    }


def test_a_token_file_that_cannot_be_read_is_named(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"^{tmp_path}: no token can be read \(.+\): set HF_TOKEN"):
        fetch(tmp_path)


def test_a_bad_token_creates_nothing(
    hub: LoopbackHub, train: Train, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(hub.repos)
    run = train(max_steps=2)
    monkeypatch.setenv("HF_TOKEN", "hf_…")
    for send in (
        lambda: train("other", push_to_hub="ann/run"),
        lambda: upload_hf.upload(upload_hf.Settings(run, "ann/tiny")),
        lambda: upload_shards(monkeypatch, data_dir, "ann/shards"),
    ):
        with pytest.raises(UserError, match=r"^HF_TOKEN: not a token"):
            send()
    assert not (tmp_path / "other").exists()
    assert len(hub.repos) == before and not hub.requests


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["name", "https://huggingface.co/ann/x", "ann/x/", "ann/x y", "ann/x/y"])
def test_a_name_to_write_to_needs_a_user(
    hub: LoopbackHub, train: Train, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for flag, send in (
        ("push-to-hub", lambda: train(push_to_hub=name)),
        ("repo-id", lambda: upload_hf.upload(upload_hf.Settings(tmp_path, name))),
        ("repo-id", lambda: upload_shards(monkeypatch, data_dir, name)),
    ):
        with pytest.raises(UserError, match=f"^--{flag} {name}: not of the form USER/NAME"):
            send()
    assert not hub.requests and not (tmp_path / "run").exists()


def test_a_name_to_read_from_needs_no_user(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.put("wikitext", {"train.parquet": b""}, "dataset")
    assert [file.name for file in sources.on_hub("wikitext", "", "main", "text").files] == ["train.parquet"]
    for name in ("https://huggingface.co/ann/words", "ann/words/", "ann/wo rds"):
        with pytest.raises(UserError, match=f"^--dataset-repo {name}: not a name of the form USER/NAME"):
            fetch_tokens_hf.fetch(name, tmp_path / "back")


# ---------------------------------------------------------------- rights


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_names_the_page_with_its_conditions(
    hub: LoopbackHub,
    train: Train,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    hub.fail("/(api|resolve)/.*gated", status=status, times=10**6, headers={"X-Error-Code": "GatedRepo"})
    monkeypatch.setattr(hellaswag_data, "GITHUB", "http://127.0.0.1:9/val.jsonl")
    monkeypatch.setattr(hellaswag_data, "HUB", {**hellaswag_data.HUB, "repo_id": "ann/gated"})
    monkeypatch.setattr(hellaswag_data, "FOLDER", tmp_path / "hellaswag")
    hub.fail("/datasets/ann/gated/resolve", status=status, times=1, headers={"X-Error-Code": "GatedRepo"})
    for page, work in (
        ("datasets/ann/gated", hellaswag_data.fetch),
        ("datasets/ann/gated", lambda: fetch_tokens_hf.fetch("ann/gated", tmp_path / "back")),
        ("datasets/ann/gated", lambda: sources.on_hub("ann/gated", "", "main", "text")),
        ("datasets/gated", lambda: sources.on_hub("gated", "", "main", "text")),
        ("datasets/ann/gated", lambda: upload_shards(monkeypatch, data_dir, "ann/gated")),
        ("ann/gated", lambda: GPT.from_pretrained("ann/gated")),
        ("ann/gated", lambda: train(push_to_hub="ann/gated")),
    ):
        advice = f"gated: accept its conditions on {hub.endpoint}/{page}, and set HF_TOKEN to a token of that"
        with pytest.raises(UserError, match=advice):
            work()
    assert set(hub.repos) == {("dataset", REPO)} and not (tmp_path / "run").exists()


def test_the_advice_about_a_403_fits_reading_and_writing(
    hub: LoopbackHub, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail("/api/datasets/ann/words$", status=403)
    with pytest.raises(UserError, match="HTTP 403: this token may not read there"):
        fetch(tmp_path)
    hub.put("ann/text", {"a.parquet": b"x"}, "dataset")
    hub.fail("/api/datasets/ann/text/tree/", status=403)
    with pytest.raises(UserError, match="HTTP 403: this token may not read there"):
        list(sources.on_hub("ann/text", "", "main", "text").blocks(0, 0))
    hub.fail("/api/models/ann/tiny", status=403)
    with pytest.raises(UserError, match="HTTP 403: this token may not read there"):
        GPT.from_pretrained("ann/tiny")
    with pytest.raises(UserError, match="HTTP 403: this token may not write there"):
        upload_shards(monkeypatch, data_dir, "bob/shards")
    hub.fail("/api/datasets/ann/words$", status=403, message="Access to this resource is disabled.")
    with pytest.raises(UserError, match="HTTP 403: disabled by the Hub"):
        fetch(tmp_path)


# ---------------------------------------------------------------- caches


def test_a_cache_that_cannot_be_used_is_named(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPO, {"manifest.json": b"{}"}, "dataset")
    cache = tmp_path / "cache"
    cache.write_text("a file")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(UserError, match=rf"{cache}.*: .+: free some space, or .*HF_HOME"):
        fetch(tmp_path)
    assert not (tmp_path / "back").exists()


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("ann/tiny", {"config.json": b"{}", "model.safetensors": b"x"})
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match=r"ann/tiny .*: No space left on device: free some space"):
        GPT.from_pretrained("ann/tiny")


def test_errors_of_the_client_are_one_line_and_bugs_are_not(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise LookupError("unheard of\nand more")

    with pytest.raises(LookupError), hub_module.user_errors("x"):
        fail()
    monkeypatch.setattr("huggingface_hub.hf_api.hf_raise_for_status", fail)
    message = (
        rf"^--dataset-repo {REPO}: the Hub's client failed \(LookupError: unheard of; set: HF_ENDPOINT\)"
    )
    with pytest.raises(UserError, match=message):
        fetch(tmp_path)


# ---------------------------------------------------------------- what does not need the Hub


@pytest.fixture
def no_way(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to break the environment."""

    def break_it() -> None:
        huggingface_hub.close_session()
        monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:9")

    return break_it


def test_a_run_continues_from_its_disk_without_a_way_to_the_hub(
    hub: LoopbackHub, train: Train, tmp_path: Path, no_way: Callable, capsys: pytest.CaptureFixture
) -> None:
    run = train(push_to_hub="ann/run", max_steps=2)
    capsys.readouterr()
    no_way()
    train(push_to_hub="ann/run", max_steps=4, resume=True)
    shown = capsys.readouterr().out
    assert "continuing from" in shown and "step_000004 is not on the Hub" in shown
    assert (run / "checkpoints" / "step_000004").exists()
    with pytest.raises(UserError, match="ALL_PROXY: no way"):
        train("new", push_to_hub="ann/new")
    assert not (tmp_path / "new").exists()


def test_shards_on_the_disk_need_no_way_to_the_hub(
    hub: LoopbackHub, data_dir: Path, tmp_path: Path, no_way: Callable, capsys: pytest.CaptureFixture
) -> None:
    fetch(tmp_path)
    no_way()
    fetch(tmp_path)  # with a manifest
    assert capsys.readouterr().out == ""
    fetch_tokens_hf.fetch(REPO, data_dir)
    assert f"note: using {data_dir} without knowing whether it is complete: " in capsys.readouterr().out


def test_text_on_the_disk_needs_no_way_to_the_hub(tmp_path: Path, no_way: Callable) -> None:
    (tmp_path / "text.txt").write_text("words")
    no_way()
    [block] = sources.local([str(tmp_path / "text.txt")], "text").blocks(0, 0)
    assert block.texts == ["words"]


def test_a_model_in_the_cache_needs_no_way_to_the_hub(
    hub: LoopbackHub, tmp_path: Path, no_way: Callable
) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path / "tiny")
    hub.put("ann/tiny", {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()})
    GPT.from_pretrained("ann/tiny")
    no_way()
    GPT.from_pretrained("ann/tiny")
    with pytest.raises(UserError, match="ALL_PROXY: no way"):
        GPT.from_pretrained("ann/other")


def test_training_continues_without_hellaswag(
    hub: LoopbackHub, train: Train, tmp_path: Path, no_way: Callable, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(hellaswag_data, "FOLDER", tmp_path / "hellaswag")
    no_way()
    train(hellaswag_interval=2, max_steps=2)
    assert "warning: continuing without HellaSwag: ALL_PROXY: no way to the Hub" in capsys.readouterr().out


def test_hellaswag_from_github_needs_no_token(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"{}\n"
    hub.put("ann/github", {"val.jsonl": content}, "dataset")
    address = f"{hub.endpoint}/datasets/ann/github/resolve/main/val.jsonl"
    monkeypatch.setattr(hellaswag_data, "GITHUB", address)
    monkeypatch.setattr(
        hellaswag_data, "SHA256", {"hellaswag_val.jsonl": hashlib.sha256(content).hexdigest()}
    )
    monkeypatch.setenv("HF_TOKEN", "hf_…")
    monkeypatch.delenv("HF_ENDPOINT")  # no mirror: GitHub comes first
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hellaswag_data, "FOLDER", tmp_path / "file" / "data")
    with pytest.raises(UserError, match=r"file/data: cannot be read or written \(.*--hellaswag-data"):
        hellaswag_data.fetch()
    monkeypatch.setattr(hellaswag_data, "FOLDER", tmp_path / "data")
    assert hellaswag_data.fetch().read_bytes() == content
