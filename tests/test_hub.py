"""Shards to the Hub and back, through the real client and a Hub on a loopback port."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY, as_flags, command
from huggingface_hub import constants
from loopback_hub import TOKEN, LoopbackHub

from pre_tokens import build_shards, fetch_tokens_hf, sources, transfer_tokens_hf
from support import hub as hub_module
from support.cli import UserError
from support.files import sha256_of

REPO = "ann/words"
FETCH = "pre_tokens/fetch_tokens_hf.py"
TRANSFER = "pre_tokens/transfer_tokens_hf.py"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.patch(monkeypatch, tmp_path)
        monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
        # The client keeps what it has in steps of this size: the real one is 10 MB.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of random words, with their manifest."""
    words = np.random.default_rng(0).choice(["tell", " me", " a", " story", "\n", " 12"], 60_000)
    (tmp_path / "words.txt").write_text("".join(words))
    source = sources.local([str(tmp_path / "words.txt")], "text")
    build_shards.build(source, tmp_path / "words", "words", 12_500)
    assert len(list((tmp_path / "words").glob("*.npy"))) == 5
    return tmp_path / "words"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def publish(hub: LoopbackHub, folder: Path, manifest: bool = True) -> None:
    files = contents(folder)
    if not manifest:
        del files["manifest.json"]
    hub.put(REPO, files, "dataset")


def upload(folder: Path, **settings: object) -> None:
    args = ["--folder", str(folder), "--repo-id", REPO, *as_flags(settings)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["transfer", *args])
        transfer_tokens_hf.main()


def script(
    hub: LoopbackHub, home: Path, name: str, *args: str, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *args), env=environment(hub, home, **env), capture_output=True, text=True, timeout=120
    )


def environment(hub: LoopbackHub, home: Path, **env: str) -> dict[str, str]:
    from helpers import environment

    return {**environment(), **hub.environment(home), **env}


# ---------------------------------------------------------------- there and back


def test_shards_go_to_the_hub_and_back_to_training(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    done = script(hub, tmp_path, TRANSFER, "--folder", str(folder), "--repo-id", REPO)
    assert done.returncode == 0, done.stderr
    assert hub.repo(REPO, "dataset").files == contents(folder)
    assert TOKEN not in done.stdout + done.stderr
    settings = {**TINY, "data_dir": tmp_path / "back", "dataset_repo": REPO, "out_dir": tmp_path / "run"}
    flags = as_flags({**settings, "max_steps": 2, "sample_interval": 0})
    done = script(hub, tmp_path, "train_gpt2.py", "--preset", "demo", *flags)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "back") == contents(folder)
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("manifest", [True, False])
def test_fetch_downloads_only_the_shards_it_needs(
    tmp_path: Path, hub: LoopbackHub, folder: Path, manifest: bool
) -> None:
    publish(hub, folder, manifest)
    back = tmp_path / "back"
    fetch_tokens_hf.fetch(REPO, back, num_shards=2)
    names = ["words_train_000001.npy", "words_val_000000.npy"]
    assert sorted(path.name for path in back.glob("*.npy")) == names
    before = len(hub.requests)
    fetch_tokens_hf.fetch(REPO, back, num_shards=2)
    assert len(hub.requests) == before  # whole: the Hub is not asked
    fetch_tokens_hf.fetch(REPO, back)  # half: completed
    assert {k: v for k, v in contents(back).items() if k.endswith(".npy")} == {
        k: v for k, v in contents(folder).items() if k.endswith(".npy")
    }
    assert all(len(hub.downloads(name)) == 1 for name in names)
    assert not list(back.glob(".*.part"))


def test_half_a_folder_without_a_manifest_is_completed(
    tmp_path: Path, hub: LoopbackHub, folder: Path
) -> None:
    publish(hub, folder, manifest=False)
    back = tmp_path / "back"
    back.mkdir()
    for name in ("words_val_000000.npy", "words_train_000002.npy"):
        (back / name).write_bytes((folder / name).read_bytes())
    fetch_tokens_hf.fetch(REPO, back)
    assert len(list(back.glob("*.npy"))) == 5
    assert hub.downloads("words_val_000000.npy") == []


def test_own_shards_stay_unchanged(
    hub: LoopbackHub, folder: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    publish(hub, folder)
    before = contents(data_dir)
    fetch_tokens_hf.fetch(REPO, data_dir)
    hub.fail("/api/", status=503, times=99)
    fetch_tokens_hf.fetch(REPO, data_dir)
    assert "without knowing whether it is complete" in capsys.readouterr().out
    assert contents(data_dir) == before


# ---------------------------------------------------------------- what goes wrong on the way down


def test_a_broken_download_continues_where_it_broke(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    publish(hub, folder)
    hub.fail("/cdn/", break_after=10_500, times=3)
    fetch_tokens_hf.fetch(REPO, tmp_path / "back", num_shards=2)
    ranges = hub.downloads("words_val_000000.npy") + hub.downloads("words_train_000001.npy")
    assert any(r == "bytes=10000-" for r in ranges), ranges
    assert contents(tmp_path / "back").items() <= contents(folder).items()


def test_a_killed_download_keeps_its_part(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    publish(hub, folder)
    name, back = "words_val_000000.npy", tmp_path / "back"
    data = (folder / name).read_bytes()
    back.mkdir()
    (back / f".{name}.{sha256_of(folder / name)[:12]}.part").write_bytes(data[:12_345])
    (back / f".{name}.{'0' * 12}.part").write_bytes(b"of another version")
    fetch_tokens_hf.fetch(REPO, back)
    assert hub.downloads(name) == ["bytes=12345-"]
    assert contents(back) == contents(folder)


def test_a_fetch_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, hub: LoopbackHub, folder: Path
) -> None:
    publish(hub, folder)
    big = np.random.default_rng(1).integers(0, 50257, 8_000_000).astype(np.uint16)
    np.save(folder / "words_train_000005.npy", big)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "words_train_000005.npy"
    manifest["shards"].append({"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    publish(hub, folder)
    hub.bytes_per_second = 12e6
    back = tmp_path / "back"
    kills = 0
    while True:
        args = ["--dataset-repo", REPO, "--data-dir", str(back)]
        process = subprocess.Popen(command(FETCH, *args), env=environment(hub, tmp_path))
        try:
            process.wait(random.uniform(2.0, 4.5) if kills < 2 else 100)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert contents(back) == contents(folder)


def test_wrong_bytes_never_get_a_name(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    publish(hub, folder)
    hub.fail("/cdn/", wrong_bytes=True, times=1)
    with pytest.raises(UserError, match=r"words_\w+.npy: arrived with another SHA-256"):
        fetch_tokens_hf.fetch(REPO, tmp_path / "back")
    fetch_tokens_hf.fetch(REPO, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_a_manifest_that_does_not_match_the_files_is_refused(
    tmp_path: Path, hub: LoopbackHub, folder: Path
) -> None:
    publish(hub, folder)
    hub.put(REPO, {"words_train_000002.npy": b"other"}, "dataset")
    with pytest.raises(UserError, match=r"words_train_000002.npy is not the one that manifest.json lists"):
        fetch_tokens_hf.fetch(REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "file", ["../up_train_000001.npy", "/tmp/up_train_000001.npy", "..", "a/b_train_000001.npy"]
)
def test_no_shard_name_leads_out_of_the_folder(
    tmp_path: Path, hub: LoopbackHub, folder: Path, file: str
) -> None:
    publish(hub, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["file"] = file
    hub.put(REPO, {"manifest.json": json.dumps(manifest).encode()}, "dataset")
    with pytest.raises(UserError, match="not a manifest of shards"):
        fetch_tokens_hf.fetch(REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("status", "times", "message"),
    [
        (401, 99, "HTTP 401: not on the Hub, or not visible to this login: check the name, or set HF_TOKEN"),
        (404, 99, "HTTP 404: not on the Hub"),
        (429, 99, "HTTP 429: too many requests"),
        (503, 99, "HTTP 503: the Hub is having problems"),
        (429, 2, ""),
        (503, 2, ""),
    ],
)
@pytest.mark.parametrize("path", ["/api/datasets", "/resolve/.*npy"])
def test_hub_errors_are_retried_or_reported_in_one_line(
    tmp_path: Path, hub: LoopbackHub, folder: Path, path: str, status: int, times: int, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Passing errors are retried; lasting ones are one line, and leave no shard and no part."""
    publish(hub, folder)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(path, status=status, times=times)
    if not message:
        fetch_tokens_hf.fetch(REPO, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(folder)
        return
    with pytest.raises(UserError, match=message):
        fetch_tokens_hf.fetch(REPO, tmp_path / "back")
    assert not list(tmp_path.glob("back/*.npy"))


def test_fetching_without_a_network_is_one_line(tmp_path: Path, hub: LoopbackHub) -> None:
    flags = as_flags({"data_dir": tmp_path / "none", "out_dir": tmp_path / "run", "device": "cpu"})
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = script(hub, tmp_path, "train_gpt2.py", *flags, **env)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        for part in (
            "ShallowU/FineWeb-Edu-10B-Tokens-NPY",
            "cannot be reached",
            "--preset demo",
            "--data-dir",
        ):
            assert part in done.stderr
    assert not (tmp_path / "none").exists() and not (tmp_path / "run").exists()


def test_an_unfinished_build_is_not_a_data_set(tmp_path: Path, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["next"] = {"file": 0, "block": 1, "token": 0, "skipped": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="incomplete"):
        fetch_tokens_hf.fetch(REPO, folder)
    with pytest.raises(UserError, match="incomplete"):
        upload(folder)


# ---------------------------------------------------------------- the way up


def test_upload_skips_files_that_are_already_there(
    hub: LoopbackHub, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    files = contents(folder)
    stale = {"words_train_000001.npy": files["words_train_000001.npy"][:-2]}
    hub.put(REPO, {"words_val_000000.npy": files["words_val_000000.npy"], **stale}, "dataset")
    upload(folder, dry_run=True)
    listed = capsys.readouterr().out
    assert "there  words_val_000000.npy" in listed
    assert "send   words_train_000001.npy" in listed
    assert "4 of 5 shards to send" in listed
    assert len(hub.repo(REPO, "dataset").commits) == 2
    upload(folder)
    assert hub.repo(REPO, "dataset").files == files
    sent = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(sent) == 4
    upload(folder)
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == 4


def test_a_dry_run_needs_no_network(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    flags = ["--folder", str(folder), "--repo-id", REPO, "--dry-run"]
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = script(hub, tmp_path, TRANSFER, *flags, **env)
        assert (done.returncode, done.stderr) == (0, "")
        assert "cannot be reached" in done.stdout
        assert "5 of 5 shards to send" in done.stdout and "everyone may see it" in done.stdout


@pytest.mark.parametrize("status", [409, 412, 429, 503])
def test_a_commit_that_conflicts_is_repeated(hub: LoopbackHub, folder: Path, status: int) -> None:
    hub.fail("/commit/", status=status, times=2)
    upload(folder)
    assert hub.repo(REPO, "dataset").files == contents(folder)
    hub.put(REPO, {"words_val_000000.npy": b"x"}, "dataset")
    hub.fail("/commit/", status=status, times=99)
    with pytest.raises(UserError, match=f"--repo-id {REPO}: HTTP {status}"):
        upload(folder)


def test_an_interrupted_upload_continues(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards first, the manifest last: a data set with a manifest is whole."""
    monkeypatch.setattr(transfer_tokens_hf, "SHARDS_PER_COMMIT", 2)
    hub.fail("/lfs/", status=400, times=1)
    hub.fail("/commit/", status=403, times=1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"HTTP 40[03]"):
            upload(folder)
        assert "manifest.json" not in hub.repo(REPO, "dataset").files
    upload(folder)
    repo = hub.repo(REPO, "dataset")
    assert repo.files == contents(folder)
    assert repo.titles[-1] == "Add the manifest"
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) <= 5 + 1


def test_missing_logins_and_rights_are_one_line(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    flags = ["--folder", str(folder), "--repo-id"]
    for repo_id, token, message in (
        (REPO, "", "no token: set HF_TOKEN"),
        (REPO, "hf_" + "x" * 30, "HTTP 401"),
        ("bob/words", TOKEN, "HTTP 403: this token may not write there"),
        ("no/such/name", TOKEN, "--repo-id no/such/name"),
    ):
        done = script(hub, tmp_path, TRANSFER, *flags, repo_id, HF_TOKEN=token)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1
        assert not token or token not in done.stdout + done.stderr
    assert not hub.repos


def test_a_damaged_shard_is_not_sent(hub: LoopbackHub, folder: Path) -> None:
    path = folder / "words_train_000003.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"words_train_000003.npy: differs from manifest.json"):
        upload(folder)
    assert not hub.repos


def test_fetching_again_finds_damage(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    path = folder / "words_train_000003.npy"
    data = bytearray(path.read_bytes())
    data[-1001] ^= 1
    path.write_bytes(data)
    done = script(hub, tmp_path, FETCH, "--dataset-repo", REPO, "--data-dir", str(folder))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}: damaged")


def test_two_machines_can_fetch_into_one_folder(tmp_path: Path, hub: LoopbackHub, folder: Path) -> None:
    publish(hub, folder)
    args = ["--dataset-repo", REPO, "--data-dir", str(tmp_path / "back")]
    processes = [
        subprocess.Popen(command(FETCH, *args), env=environment(hub, tmp_path), cwd=ROOT) for _ in range(2)
    ]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    assert contents(tmp_path / "back") == contents(folder)
    assert all(len(hub.downloads(path.name)) == 1 for path in folder.glob("*.npy"))
