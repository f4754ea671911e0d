"""Copy of a run on the Hub: a thread sends checkpoints while training continues, `prepare` brings them back.

    python train_gpt2.py --resume --push-to-hub USER/NAME

One commit adds a checkpoint and deletes older ones, so that the repository always holds a complete one. Its
layout is in support/remote.py. The Hub's client is imported where it is used.
"""

import functools
import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from support import checkpoint, files, hub, metrics, remote, run_files
from support.cli import UserError
from support.metrics import Metrics
from support.remote import Remote

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

    from settings import Settings

ARRIVING = ".from-hub"  # folder for files that are being fetched
PINNED = ".pushing-"  # prefix of a folder with links to a checkpoint that is being sent
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds between retries
TRIED_AGAIN = "it will be tried again"
LAST_WAIT = 600  # seconds for the last push of a run, less than the other processes wait


# ---------------------------------------------------------------- at the start of a run


def prepare(s: "Settings") -> str | None:
    """Create the repository; or bring its run back if --resume finds less in the run folder.

    Returns the newest commit. None without --push-to-hub, or if the Hub is out of reach and the run can
    continue without it for now. Raises UserError if the token is missing, wrong or lacks rights, if the
    repository holds another run or something else, and if a run that it may hold cannot be brought back.
    """
    if not s.push_to_hub:
        return None
    what = f"--push-to-hub {s.push_to_hub}"
    hub.check_name(what, s.push_to_hub)
    newest = _newest_step(s.out_dir) if s.resume else None
    try:
        with hub.user_errors(what, "wait until it can, or train without --push-to-hub"):
            hub.require_token(what)
            there = hub.with_retries(lambda: _open_repository(s))
            if newest is not None:
                hub.with_retries(lambda: remote.check_same_run(s.push_to_hub, there, s.out_dir))
    except UserError as error:
        if newest is None or not (hub.is_transient(error) or isinstance(error, hub.NoWay)):
            raise
        print(f"warning: {error}")
        print(f"continuing from {s.out_dir}: its checkpoints are sent once the Hub answers")
        return None
    if not there.private and not s.push_public:
        print(f"note: {s.push_to_hub} is public: anyone can read this run")
    if there.newest and s.overwrite:
        print(f"{what}: holds a run of {there.newest} steps: the first checkpoint of this one replaces it")
    elif there.newest and not s.resume:
        raise UserError(
            f"{what}: already holds a run of {there.newest} steps: continue it with --resume, "
            "replace it with --overwrite, or name another repository"
        )
    elif there.newest > (newest or 0):
        _bring_back(s, there)
    return there.sha


def _newest_step(out_dir: Path) -> int | None:
    """Step of the newest intact checkpoint in the run folder, None if there is none."""
    try:
        newest, _ = checkpoint.latest_intact(out_dir)
    except UserError:  # all are damaged
        return None
    return checkpoint.step_of(newest) if newest else None


def _open_repository(s: "Settings") -> Remote:
    """Check the right to write, create the repository if it does not exist, and return its content."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = remote.client()
    try:
        api.auth_check(s.push_to_hub, write=True)
    except GatedRepoError:  # a kind of the next
        raise
    except RepositoryNotFoundError:  # or invisible: then the next line is refused
        api.create_repo(s.push_to_hub, private=not s.push_public, exist_ok=True)
    return remote.look(s.push_to_hub)


def _bring_back(s: "Settings", there: Remote) -> None:
    """Fetch the checkpoints that the disk lacks, the metrics and the settings into the run folder.

    Files get their names only after the hashes have been verified, the newest checkpoint last, because the
    run counts as being there from then on. The next call continues an interrupted fetch.
    """
    newest, *older = there.checkpoints
    folders = [newest, *(folder for folder in older if not (s.out_dir / folder).exists())]
    wanted = [
        file for file in there.files if remote.STEP_FILE.fullmatch(file) and Path(file).parent in folders
    ]
    others = [file for file in (run_files.METRICS, run_files.CONFIG) if file in there.files]
    print(f"fetching   {newest} of {s.push_to_hub}")
    arriving = s.out_dir / ARRIVING
    try:
        files.make_folder(arriving)
        lock = files.lock_folder(s.out_dir)
        if lock is None:
            raise UserError(f"{s.out_dir}: another process is training in it: wait for it to end")
        try:
            for file in [*wanted, *others]:
                _fetch(s.push_to_hub, there.sha, file, arriving)
            _check_arrived(s.push_to_hub, arriving, folders)
            for file in others:
                files.replace(arriving / file, s.out_dir / file)
            for folder in reversed(folders):
                checkpoint.put_in_place(arriving / folder, s.out_dir / folder)
            shutil.rmtree(arriving)
        finally:
            lock.release()
    except OSError as error:
        raise UserError(f"--out-dir {s.out_dir}: cannot be written ({error}): free some space") from error


def _fetch(repo_id: str, sha: str, file: str, folder: Path) -> None:
    """Fetch one file and flush it to the disk."""
    with hub.user_errors(f"--push-to-hub {repo_id}: {file}", "run the same command again"):
        path = hub.with_retries(lambda: remote.download(repo_id, sha, file, folder))
    files.flush_to_disk(path)


def _check_arrived(repo_id: str, arriving: Path, folders: list[Path]) -> None:
    """Delete everything that has arrived, and raise UserError, unless the checkpoints' hashes are right."""
    try:
        for folder in folders:
            checkpoint.verify(arriving / folder)
        metrics.read(arriving / run_files.METRICS)
    except UserError as error:
        shutil.rmtree(arriving)
        raise UserError(f"--push-to-hub {repo_id}: {error}: run the same command again") from error


# ---------------------------------------------------------------- while it trains


class Pusher:
    """Sends the checkpoints of a run from a thread. Failures are retried and never end the run.

    The main thread only says what to send. A checkpoint that still waits when the next one arrives is
    skipped.
    """

    def __init__(self, s: "Settings", head: str | None, newest: Path | None, silent: bool = False) -> None:
        """head: the newest commit, from `prepare`. newest: a checkpoint to begin with.

        silent: do nothing, as every process but the first, and every run without --push-to-hub.
        """
        self.s = s
        self.head = head
        self.step = checkpoint.step_of(newest) if newest else 0  # of events in the metrics
        self.newest = newest  # handed over last
        self.written: Future[None] | None = None  # its writing
        self.changed = threading.Condition()  # guards the next four
        self.wanted = newest  # checkpoint to send next, with the metrics; None: nothing
        self.sending: Path | None = None
        self.failures: list[str] = []  # not yet recorded
        self.closing = False
        self.sent: set[str] = set()  # names of checkpoints
        self.sent_metrics: list[bytes] = []
        self.thread: threading.Thread | None = None
        if s.push_to_hub and not silent:
            for stale in (s.out_dir / checkpoint.FOLDER).glob(f"{PINNED}*"):
                shutil.rmtree(stale)  # left by a crash
            self.thread = threading.Thread(target=self._work, name="push to hub", daemon=True)
            self.thread.start()

    def send(self, metrics: Metrics, step: int, folder: Path, written: Future[None]) -> None:
        """Send the checkpoint of `step`, once `written` has succeeded. Returns at once.

        Also records failures since the last call.
        """
        if self.thread is None:
            return
        self.step, self.newest, self.written = step, folder, written
        self._record_failures(metrics)
        written.add_done_callback(functools.partial(self._want, folder))

    def close(self, metrics: Metrics) -> None:
        """Send the last metrics, and wait a bounded time for what is still to be sent."""
        if self.thread is None:
            return
        # The callback of a write that has just ended may not have run yet.
        failed = self.written is not None and self.written.exception() is not None
        with self.changed:
            self.wanted = self.wanted if failed else self.newest  # again, for the last metrics
            self.closing = True
            self.changed.notify_all()
        self.thread.join(1)
        if self.thread.is_alive():
            print(f"sending the last checkpoint to {self.s.push_to_hub}, at most {LAST_WAIT // 60} minutes")
            self.thread.join(LAST_WAIT)
        with self.changed:
            if unsent := self.wanted or self.sending:
                print(
                    f"warning: {unsent.name} is not on the Hub: "
                    "run the same command with --resume to upload it"
                )
                self.failures.append(f"{unsent.name} was not sent before the end of the run")
        self._record_failures(metrics)

    def _want(self, folder: Path, written: Future[None]) -> None:
        if written.exception() is None:
            with self.changed:
                self.wanted = folder
                self.changed.notify_all()

    def _record_failures(self, metrics: Metrics) -> None:
        with self.changed:
            failures, self.failures = self.failures, []
        for reason in failures:
            metrics.log(self.step, "event", name="push failed", reason=reason)

    def _work(self) -> None:
        """Run the thread: send what is wanted, until closed with nothing left to send."""
        pause, reported = FIRST_WAIT, ""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted or self.closing)
                folder, self.wanted = self.wanted, None
                self.sending = folder
            if folder is None:
                return
            failure = self._try(folder)
            with self.changed:
                self.sending = None
                if failure is None:
                    pause, reported = FIRST_WAIT, ""
                    continue
                reason = str(failure) if isinstance(failure, UserError) else repr(failure)
                kind = "outage" if hub.is_transient(failure) else reason
                if kind != reported:  # once per outage, not per retry
                    self.failures.append(f"{folder.name} not sent: {reason}")
                    print(f"warning: {self.failures[-1]}")
                if self.wanted is None:
                    self.wanted = folder
                    if self.closing and not hub.is_transient(failure):
                        return
                    self.changed.wait(pause)
            pause, reported = min(2 * pause, LONGEST_WAIT), kind

    def _try(self, folder: Path) -> BaseException | None:
        """Push the checkpoint. Returns the error, if any."""
        try:
            self._push(folder)
        except BaseException as error:  # even an exit: a failed push must never end the run
            return error
        return None

    def _push(self, newest: Path) -> None:
        """Commit the newest checkpoint, the best with --keep-best, and the metrics; delete others."""
        s, step = self.s, checkpoint.step_of(newest)
        best = run_files.by_validation_loss(s.out_dir)[:1] if s.keep_best else []
        folders = list(dict.fromkeys([newest, *best]))
        pinned = []
        try:
            with hub.user_errors(f"--push-to-hub {s.push_to_hub}", TRIED_AGAIN, TRIED_AGAIN):
                from huggingface_hub import CommitOperationDelete
                from huggingface_hub.utils import disable_progress_bars

                disable_progress_bars()
                api, there = remote.client(), remote.look(s.push_to_hub)
                if there.newest and there.sha != self.head:  # someone else's commit
                    remote.check_same_run(s.push_to_hub, there, s.out_dir)
                    if there.newest > step:
                        raise UserError(
                            f"--push-to-hub {s.push_to_hub}: another machine has sent step {there.newest}: "
                            "stop one of the two"
                        )
                held = {folder.name for folder in there.checkpoints}
                new = [folder for folder in folders if folder.name not in self.sent & held]
                old = held - {folder.name for folder in folders}
                current = _read_metrics(s.out_dir)
                if not new and not old and current == self.sent_metrics:
                    return
                pinned = [_pin(folder) for folder in new]
                additions = _additions(current, dict(zip(new, pinned, strict=True)))
                # One by one, because several use a pool of threads for which the interpreter waits at exit.
                for addition in additions:
                    api.preupload_lfs_files(s.push_to_hub, [addition], free_memory=False)
                deletions = [CommitOperationDelete(f"{checkpoint.FOLDER}/{name}/") for name in sorted(old)]
                commit = api.create_commit(
                    s.push_to_hub,
                    [*additions, *deletions],
                    commit_message=f"Checkpoint after {step} steps",
                    parent_commit=there.sha,
                )
            self.head = commit.oid
            self.sent_metrics = current
            self.sent |= {folder.name for folder in folders}
            if new:
                print(f"{newest.name} is on the Hub: {s.push_to_hub}")
        finally:
            for folder in set(pinned) - set(folders):
                shutil.rmtree(folder, ignore_errors=True)


def _pin(folder: Path) -> Path:
    """Hard-link the files of a checkpoint into a folder, because training may remove it while it is sent."""
    pinned = folder.with_name(PINNED + folder.name)
    shutil.rmtree(pinned, ignore_errors=True)
    try:
        pinned.mkdir()
        for file in folder.glob("[!.]*"):
            os.link(file, pinned / file.name)
    except OSError:  # a file system without them
        shutil.rmtree(pinned, ignore_errors=True)
        return folder
    return pinned


def _read_metrics(out_dir: Path) -> list[bytes]:
    """Read metrics.jsonl and config.json as they are now."""
    lines = (out_dir / run_files.METRICS).read_bytes()
    lines = lines[: lines.rfind(b"\n") + 1]  # the last line may still be incomplete
    return [lines, (out_dir / run_files.CONFIG).read_bytes()]


def _additions(current: list[bytes], new: dict[Path, Path]) -> list["CommitOperationAdd"]:
    """Build the additions of a commit: `_read_metrics`, and new checkpoints, folder -> source of its files.

    Raises UserError if a checkpoint is damaged, because it must not replace a good one.
    """
    from huggingface_hub import CommitOperationAdd

    names = (run_files.METRICS, run_files.CONFIG)
    additions = [CommitOperationAdd(name, data) for name, data in zip(names, current, strict=True)]
    for folder, source in new.items():
        checkpoint.verify(source)
        there = f"{checkpoint.FOLDER}/{folder.name}"
        visible = sorted(source.glob("[!.]*"))
        additions += [CommitOperationAdd(f"{there}/{file.name}", file) for file in visible]
    return additions
