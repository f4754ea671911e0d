"""A run in a repository of the Hub: what is there, whose it is, fetching files of it.

    USER/NAME/checkpoints/step_000500/       folders as they are on the disk
    USER/NAME/metrics.jsonl, config.json     of the run

The Hub's client is imported where it is used: most runs do without it.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from support import checkpoint, metrics, run_files
from support.cli import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NETWORK_TIMEOUT = 120  # seconds without a byte; the client itself would wait for ever
STEP_FILE = re.compile(rf"{checkpoint.FOLDER}/step_\d{{6,}}/\w[\w.-]*")


@dataclass
class Remote:
    """What a repository holds, at one commit."""

    sha: str
    private: bool
    files: list[str]

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, as paths in the repository, newest first."""
        folders = {Path(file).parent for file in self.files if STEP_FILE.fullmatch(file)}
        return sorted(folders, key=checkpoint.step_of, reverse=True)

    @property
    def newest(self) -> int:
        """The step of its newest checkpoint, 0 if there is none."""
        return checkpoint.step_of(self.checkpoints[0]) if self.checkpoints else 0


def client() -> "HfApi":
    """The Hub's client, set to give up on a connection that stays silent."""
    from huggingface_hub import HfApi, get_session

    get_session().timeout = NETWORK_TIMEOUT
    return HfApi()


def look(repo_id: str) -> Remote:
    """What the repository holds now. Raises UserError if that is not a run that was pushed there."""
    info = client().model_info(repo_id)
    remote = Remote(info.sha, info.private, [file.rfilename for file in info.siblings])
    is_model = "model.safetensors" in remote.files
    if is_model or (not remote.checkpoints and {run_files.CONFIG, run_files.METRICS} & set(remote.files)):
        raise UserError(
            f"--push-to-hub {repo_id}: holds something other than a pushed run: name another repository"
        )
    return remote


def check_same_run(repo_id: str, remote: Remote, out_dir: Path) -> None:
    """Raise UserError if the repository's metrics are of another run than those in the run folder.

    Two runs differ in the first step they record, by its time if by nothing else.
    """
    if run_files.METRICS not in remote.files:
        return
    with tempfile.TemporaryDirectory() as folder:
        theirs = metrics.read(download(repo_id, remote.sha, run_files.METRICS, Path(folder)))
    ours = metrics.read(out_dir / run_files.METRICS)
    first = [next((r for r in records if r["kind"] == "train"), None) for records in (ours, theirs)]
    if None not in first and first[0] != first[1]:
        raise UserError(f"--push-to-hub {repo_id}: holds another run than {out_dir}: name another repository")


def download(repo_id: str, sha: str, file: str, folder: Path) -> Path:
    """Fetch one file of the repository into a local folder, under the same path."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, file, revision=sha, local_dir=folder))
