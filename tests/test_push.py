"""Checkpoints to the Hub while a run trains, and a lost run back from it. The Hub is on a loopback port."""

import dataclasses
import functools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers import ROOT, TINY, as_flags, check_complete, command, environment, history
from loopback_hub import TOKEN, LoopbackHub

import settings
import train_gpt2
from support import checkpoint, push, remote
from support import hub as hub_module
from support.cli import UserError
from support.metrics import Metrics

REPO = "ann/run"
Train = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.patch(monkeypatch, tmp_path)
        # Retries without their pauses; tests themselves wait with time.sleep, so that stays as it is.
        fast = functools.partial(hub_module.with_retries, tries=2)
        monkeypatch.setattr(hub_module, "with_retries", fast)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr(push, "FIRST_WAIT", 0.02)
        monkeypatch.setattr(push, "LONGEST_WAIT", 0.1)
        yield running


@pytest.fixture
def undisturbed(train: Train) -> Path:
    return train("undisturbed", min_lr_ratio=1.0)  # the rate of a step does not depend on --max-steps


def contents(run: Path, step: int) -> dict[str, bytes]:
    """The files of a run's checkpoint, named as in the repository."""
    folder = checkpoint.folder_of(run, step)
    return {str(file.relative_to(run)): file.read_bytes() for file in folder.iterdir()}


def events(run: Path, name: str) -> list[dict[str, object]]:
    return [r for r in history(run, ("event",)) if r["name"] == name]


# ---------------------------------------------------------------- there and back


def test_push_sends_the_newest_checkpoint(
    train: Train, hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(push_to_hub=REPO, reload_checkpoints=True)
    repo = hub.repo(REPO)
    assert repo.private
    assert repo.files == {
        **contents(run, 6),
        "metrics.jsonl": (run / "metrics.jsonl").read_bytes(),
        "config.json": (run / "config.json").read_bytes(),
    }
    for _, _, files in repo.commits[1:]:  # the first is the empty one of a new repository
        assert len(check_complete(files, tmp_path)) == 1
    assert not list(run.glob("checkpoints/.*"))
    assert not events(run, "push failed")
    shown = capsys.readouterr()
    assert f"step_000006 is on the Hub: {REPO}" in shown.out
    assert TOKEN not in shown.out + shown.err


def test_a_run_continues_on_a_new_machine(
    train: Train, hub: LoopbackHub, undisturbed: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same command on the next box: bit for bit what an undisturbed run writes."""
    run = train(push_to_hub=REPO, resume=True, max_steps=4, min_lr_ratio=1.0)
    shutil.rmtree(run)
    capsys.readouterr()
    train(push_to_hub=REPO, resume=True, min_lr_ratio=1.0)
    assert f"fetching   checkpoints/step_000004 of {REPO}" in capsys.readouterr().out
    check_same(run, undisturbed, 6)
    assert [r["step"] for r in events(run, "resume")] == [4]
    assert not list(run.glob(".from-hub"))
    assert check_complete(hub.repo(REPO).files, run.parent) == [6]


def check_same(run: Path, undisturbed: Path, step: int) -> None:
    assert history(run) == history(undisturbed)
    ours, theirs = contents(run, step), contents(undisturbed, step)
    name = f"checkpoints/step_{step:06d}/model.safetensors"
    assert ours[name] == theirs[name]


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_client_is_only_imported_for_a_run_that_pushes() -> None:
    code = "import sys, train_gpt2; assert 'huggingface_hub.hf_api' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


# ---------------------------------------------------------------- what fails while it trains


def test_training_never_waits_for_the_hub(
    train: Train, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub hangs until the last step is done: a step that waited for it would never be made."""
    all_done, waited = threading.Event(), []
    push_now, finish = push.Pusher._push, train_gpt2.finish
    monkeypatch.setattr(
        push.Pusher, "_push", lambda *args: (waited.append(all_done.wait(30)), push_now(*args))
    )
    monkeypatch.setattr(train_gpt2, "finish", lambda *args: (finish(*args), all_done.set()))
    train(push_to_hub=REPO)
    assert waited and all(waited)
    assert "checkpoints/step_000006/model.safetensors" in hub.repo(REPO).files


def send(pusher: push.Pusher, opened: Metrics, run: Path, step: int) -> None:
    """Hand over a checkpoint that has been written."""
    written: Future[None] = Future()
    written.set_result(None)
    pusher.send(opened, step, checkpoint.folder_of(run, step), written)


@pytest.fixture
def opened(undisturbed: Path) -> Metrics:
    return Metrics(undisturbed / "metrics.jsonl", keep_until=6)


def settings_of(run: Path, **values: object) -> settings.Settings:
    values = {"out_dir": run, "push_to_hub": REPO, "resume": True, **values}
    return dataclasses.replace(settings.PRESETS["demo"], **values)


@pytest.mark.parametrize("status", [503, 429, 412, 0])
def test_an_outage_is_retried_and_reported_once(
    hub: LoopbackHub, undisturbed: Path, opened: Metrics, status: int, capsys: pytest.CaptureFixture
) -> None:
    """One line and one event about all attempts; afterwards the newest is sent, and no older one."""
    s = settings_of(undisturbed)
    pusher = push.Pusher(s, push.prepare(s), None)
    if status:
        hub.fail("/commit/", status=status, times=10**6)
    else:
        hub.fail("/api/", break_after=0, times=10**6)
    for step in (2, 4, 6):
        send(pusher, opened, undisturbed, step)
        before = len(hub.requests)
        wait_for(lambda: len(hub.requests) > before + 6)  # noqa: B023
    hub.faults.clear()
    pusher.close(opened)
    assert hub.repo(REPO).titles == ["initial commit", "Checkpoint after 6 steps"]
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [6]
    failed = events(undisturbed, "push failed")
    assert len(failed) == 1
    assert (f"HTTP {status}" if status else "cannot be reached") in failed[0]["reason"]
    shown = capsys.readouterr().out
    assert shown.count("warning: step_000002 not sent: ") == shown.count("warning") == 1


def test_a_vanished_repository_does_not_end_the_run(
    train: Train, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    push_now = push.Pusher._push
    monkeypatch.setattr(push.Pusher, "_push", lambda *args: (push_now(*args), hub.repos.clear()))
    run = train(push_to_hub=REPO)
    assert (run / "summary.json").exists()
    reasons = [r["reason"] for r in events(run, "push failed")]
    assert "HTTP 404" in reasons[0] and "not sent before the end of the run" in reasons[-1]
    assert not hub.repos  # whoever deleted it meant it
    assert "run the same command with --resume to upload it" in capsys.readouterr().out


def test_the_wait_at_the_end_is_bounded(
    train: Train, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "LAST_WAIT", 0.1)
    hub.fail("/commit/", status=503, times=10**6)
    begin = time.monotonic()
    run = train(push_to_hub=REPO)
    assert time.monotonic() - begin < 20
    assert events(run, "push failed")[-1]["reason"] == "step_000006 was not sent before the end of the run"
    hub.faults.clear()
    train(push_to_hub=REPO, resume=True)
    assert check_complete(hub.repo(REPO).files, run.parent) == [6]


def test_a_checkpoint_can_be_removed_while_it_is_sent(
    hub: LoopbackHub, undisturbed: Path, opened: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    folder, upload = checkpoint.folder_of(undisturbed, 2), HfApi.preupload_lfs_files
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    monkeypatch.setattr(HfApi, "preupload_lfs_files", lambda *a, **k: (remove(), upload(*a, **k)))
    s = settings_of(undisturbed)
    pusher = push.Pusher(s, push.prepare(s), folder)
    wait_for(lambda: len(hub.repo(REPO).commits) > 1)
    assert not folder.exists()
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [2]
    send(pusher, opened, undisturbed, 6)
    pusher.close(opened)
    assert not events(undisturbed, "push failed")


def test_the_newest_and_the_best_are_kept(
    train: Train, hub: LoopbackHub, undisturbed: Path, opened: Metrics
) -> None:
    """And no more; what is there is not sent again, and both come back."""
    opened.log(2, "val", loss=1.0)
    s = settings_of(undisturbed, keep_best=True)
    pusher = push.Pusher(s, push.prepare(s), None)
    for number, told in enumerate(([2], [4, 2], [6, 2]), start=2):
        send(pusher, opened, undisturbed, told[0])
        wait_for(lambda: len(hub.repo(REPO).commits) == number)  # noqa: B023
        assert check_complete(hub.repo(REPO).files, undisturbed.parent) == told
    asked = [path for method, path, _ in hub.requests if "/preupload/" in path]
    n_files = len(contents(undisturbed, 6)) + 2
    assert len(asked) == 3 * n_files  # those of the new checkpoint alone
    opened.log(6, "val", loss=0.5)
    pusher.close(opened)
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [6]
    hub.repo(REPO).commits.pop()
    shutil.rmtree(undisturbed)
    push.prepare(s)
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(undisturbed)] == [6, 2]


def test_a_push_deletes_all_older_checkpoints(hub: LoopbackHub, undisturbed: Path, opened: Metrics) -> None:
    """In the commit that adds the newest."""
    older = {}
    for step in (1, 2, 3):
        older |= {k.replace("_000002", f"_{step:06d}"): v for k, v in contents(undisturbed, 2).items()}
    hub.put(REPO, {**older, "metrics.jsonl": (undisturbed / "metrics.jsonl").read_bytes()})
    s = settings_of(undisturbed)
    pusher = push.Pusher(s, push.prepare(s), None)
    with open(undisturbed / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ki')  # a line that is being written
    send(pusher, opened, undisturbed, 6)
    pusher.close(opened)
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [6]
    assert hub.repo(REPO).files["metrics.jsonl"].endswith(b"}\n")


def test_a_commit_whose_answer_is_lost_is_recognised(
    hub: LoopbackHub, undisturbed: Path, opened: Metrics
) -> None:
    """The repository has it; the next attempt finds its own step there, and takes it for no one else's."""
    s = settings_of(undisturbed)
    pusher = push.Pusher(s, push.prepare(s), None)
    hub.fail("/commit/", break_after=0, times=2)
    for step in (4, 6):
        send(pusher, opened, undisturbed, step)
        wait_for(lambda: f"Checkpoint after {step} steps" in hub.repo(REPO).titles)  # noqa: B023
    pusher.close(opened)
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [6]
    assert not [e for e in events(undisturbed, "push failed") if "another machine" in e["reason"]]


def test_a_damaged_checkpoint_replaces_nothing(hub: LoopbackHub, undisturbed: Path, opened: Metrics) -> None:
    s = settings_of(undisturbed)
    pusher = push.Pusher(s, push.prepare(s), checkpoint.folder_of(undisturbed, 4))
    wait_for(lambda: len(hub.repo(REPO).commits) == 2)
    weights = checkpoint.folder_of(undisturbed, 6) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    send(pusher, opened, undisturbed, 6)
    pusher.close(opened)
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [4]
    assert "damaged" in events(undisturbed, "push failed")[0]["reason"]


def test_the_machine_that_is_behind_stops_pushing(
    hub: LoopbackHub, undisturbed: Path, opened: Metrics
) -> None:
    """The one that is behind sends nothing more."""
    s = settings_of(undisturbed)
    pusher = push.Pusher(s, push.prepare(s), None)
    other = {name.replace("_000006", "_000008"): data for name, data in contents(undisturbed, 6).items()}
    hub.put(REPO, {**other, "metrics.jsonl": (undisturbed / "metrics.jsonl").read_bytes()})
    send(pusher, opened, undisturbed, 6)
    pusher.close(opened)
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [8]
    assert "another machine has sent step 8" in events(undisturbed, "push failed")[0]["reason"]


def test_a_concurrent_commit_is_noticed(
    hub: LoopbackHub, undisturbed: Path, opened: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking at the repository and committing to it: nothing of that machine's is lost."""
    s = settings_of(undisturbed)
    pusher, look = push.Pusher(s, push.prepare(s), None), remote.look
    other = {name.replace("_000006", "_000008"): data for name, data in contents(undisturbed, 6).items()}
    other["metrics.jsonl"] = (undisturbed / "metrics.jsonl").read_bytes()
    late = iter([lambda: hub.put(REPO, other)])
    monkeypatch.setattr(remote, "look", lambda name: (look(name), next(late, lambda: None)())[0])
    send(pusher, opened, undisturbed, 6)
    pusher.close(opened)
    assert check_complete(hub.repo(REPO).files, undisturbed.parent) == [8]
    reasons = [event["reason"] for event in events(undisturbed, "push failed")]
    assert any("another machine has sent step 8" in reason for reason in reasons), reasons


# ---------------------------------------------------------------- what is refused at the start


def test_a_wrong_token_is_one_line(hub: LoopbackHub, data_dir: Path, tmp_path: Path) -> None:
    values = {**TINY, "data_dir": data_dir, "dataset_repo": "none", "out_dir": tmp_path / "run"}
    flags = as_flags({**values, "push_to_hub": REPO, "resume": True})
    wrong = "hf_" + "x" * 30
    done = subprocess.run(
        command("train_gpt2.py", "--preset", "demo", *flags),
        env={**environment(), **hub.environment(tmp_path, wrong)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --push-to-hub {REPO}: HTTP 401: ") and done.stderr.count("\n") == 1
    assert wrong not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists() and not hub.repos


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        (REPO, "", "no token: set HF_TOKEN"),
        ("bob/run", TOKEN, "HTTP 403: this token may not write there"),
        ("bob/public", TOKEN, "HTTP 403: this token may not write there"),
        ("no/such/name", TOKEN, "not of the form USER/NAME"),
        ("ann/model", TOKEN, "holds something other than a pushed run"),
        ("ann/notes", TOKEN, "holds something other than a pushed run"),
    ],
)
def test_unsuitable_repositories_are_refused_at_the_start(
    train: Train, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str, token: str,
    message: str,
) -> None:  # fmt: skip
    """Even where the run could be continued from the run folder."""
    hub.put("bob/public", {})
    hub.put("ann/model", {"model.safetensors": b"x", "checkpoints/step_000002/SHA256SUMS": b"x"})
    hub.put("ann/notes", {"config.json": b"{}"})
    before = {key: repo.sha for key, repo in hub.repos.items()}
    run = train(max_steps=2)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"--push-to-hub {repo_id}: {message}"):
        train(push_to_hub=repo_id, resume=True, max_steps=4)
    assert checkpoint.step_of(checkpoint.folders(run)[0]) == 2
    assert {key: repo.sha for key, repo in hub.repos.items()} == before


def test_a_repository_with_a_run_needs_resume_or_overwrite(
    train: Train, hub: LoopbackHub, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    train(push_to_hub=REPO)
    with pytest.raises(UserError, match="already holds a run of 6 steps: continue it with --resume"):
        train("other", push_to_hub=REPO)
    assert not (tmp_path / "other").exists()
    other = train("other", max_steps=2)
    with pytest.raises(UserError, match="holds another run than"):
        train("other", push_to_hub=REPO, resume=True)
    assert check_complete(hub.repo(REPO).files, tmp_path) == [6]
    capsys.readouterr()
    train("other", push_to_hub=REPO, overwrite=True, max_steps=2)
    assert f"{REPO}: holds a run of 6 steps: the first checkpoint of this one replaces it" in (
        capsys.readouterr().out
    )
    assert hub.repo(REPO).files.items() >= contents(other, 2).items()
    assert check_complete(hub.repo(REPO).files, tmp_path) == [2]
    third = train("third", push_to_hub=REPO, overwrite=True, max_steps=2, seed=5)  # a checkpoint of that name
    assert contents(third, 2) != contents(other, 2)
    assert hub.repo(REPO).files.items() >= contents(third, 2).items()


def test_repositories_are_private_unless_push_public(
    train: Train, hub: LoopbackHub, capsys: pytest.CaptureFixture
) -> None:
    train("a", push_to_hub="ann/a", push_public=True, max_steps=2)
    assert not hub.repo("ann/a").private
    assert "is public" not in capsys.readouterr().out
    hub.put("ann/b", {})
    train("b", push_to_hub="ann/b", max_steps=2)
    assert "note: ann/b is public: anyone can read this run" in capsys.readouterr().out


# ---------------------------------------------------------------- the way back


@pytest.mark.parametrize("status", [503, 0])
def test_a_hub_out_of_reach_at_the_start_does_not_stop_a_resume(
    train: Train, hub: LoopbackHub, tmp_path: Path, status: int, capsys: pytest.CaptureFixture
) -> None:
    """With a local checkpoint the run continues; without one, a fresh start could replace the real run."""
    fail = {"status": status} if status else {"break_after": 0}
    hub.fail("/api/", times=10**6, **fail)
    for resume in (True, False):
        with pytest.raises(UserError, match=f"--push-to-hub {REPO}: (HTTP 503|the Hub cannot be reached)"):
            train(push_to_hub=REPO, resume=resume)
        assert not (tmp_path / "run").exists()
    hub.faults.clear()
    train(push_to_hub=REPO, max_steps=2)
    hub.fail("/api/", times=4, **fail)
    capsys.readouterr()
    train(push_to_hub=REPO, resume=True)
    shown = capsys.readouterr().out
    assert f"warning: --push-to-hub {REPO}: " in shown and "are sent once the Hub answers" in shown
    assert check_complete(hub.repo(REPO).files, tmp_path) == [6]


def test_the_newer_of_disk_and_hub_wins(
    train: Train, hub: LoopbackHub, tmp_path: Path, undisturbed: Path
) -> None:
    run = train(push_to_hub=REPO, max_steps=4, min_lr_ratio=1.0)
    before = len(hub.requests)
    train(push_to_hub=REPO, resume=True, max_steps=4, min_lr_ratio=1.0)  # equal
    train(resume=True, min_lr_ratio=1.0)
    train(push_to_hub=REPO, resume=True, min_lr_ratio=1.0)  # newer on the disk
    fetched = [path for _, path, _ in hub.requests[before:] if "/resolve/" in path]
    assert fetched and all(path.endswith("metrics.jsonl") for path in fetched)  # whose run it is
    assert check_complete(hub.repo(REPO).files, tmp_path) == [6]
    check_same(run, undisturbed, 6)


@pytest.mark.parametrize("damage", ["older", "damaged"])
def test_a_resume_fetches_a_newer_run_from_the_hub(
    train: Train, hub: LoopbackHub, undisturbed: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    run = train(push_to_hub=REPO, min_lr_ratio=1.0)
    newest = checkpoint.folder_of(run, 6)
    if damage == "older":
        shutil.rmtree(newest)
    else:
        for folder in checkpoint.folders(run):
            (folder / "training_state.pt").write_bytes(b"")
    train(push_to_hub=REPO, resume=True, min_lr_ratio=1.0)
    assert f"fetching   checkpoints/step_000006 of {REPO}" in capsys.readouterr().out
    check_same(run, undisturbed, 6)


def test_damaged_downloads_get_no_name(
    train: Train, hub: LoopbackHub, tmp_path: Path, undisturbed: Path
) -> None:
    run = train(push_to_hub=REPO, max_steps=4, min_lr_ratio=1.0)
    shutil.rmtree(run)
    hub.fail("/cdn/", wrong_bytes=True)
    with pytest.raises(UserError, match=r"damaged: run the same command again"):
        train(push_to_hub=REPO, resume=True, min_lr_ratio=1.0)
    hub.fail("/resolve/.*training_state", status=404)
    with pytest.raises(UserError, match=r"training_state.pt: HTTP 404"):
        train(push_to_hub=REPO, resume=True, min_lr_ratio=1.0)
    assert not checkpoint.folders(run) and not (run / "metrics.jsonl").exists()
    train(push_to_hub=REPO, resume=True, min_lr_ratio=1.0)
    check_same(run, undisturbed, 6)


def test_no_file_of_a_repository_leads_out_of_the_folder(
    train: Train, hub: LoopbackHub, tmp_path: Path
) -> None:
    run = train(push_to_hub=REPO, max_steps=2)
    shutil.rmtree(run)
    hub.put(REPO, {"checkpoints/step_000002/../../../../up.txt": b"x", "checkpoints/step_000009x/a": b"x"})
    train(push_to_hub=REPO, resume=True, max_steps=4)
    assert not list(tmp_path.parent.rglob("up.txt"))
    assert check_complete(hub.repo(REPO).files, tmp_path)[0] == 4
