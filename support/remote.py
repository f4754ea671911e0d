"""A run in a repository on the Hub: list it, tell whose it is, fetch files.

    USER/NAME/checkpoints/step_000500/       folders as they are on the disk
    USER/NAME/metrics.jsonl, config.json     of the run

The Hub's client is imported where it is used, because most runs do not need it.
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

NETWORK_TIMEOUT = 120  # seconds without a byte; the client would wait for ever
STEP_FILE = re.compile(rf"{checkpoint.FOLDER}/step_\d{{6,}}/\w[\w.-]*")


@dataclass
class Remote:
    """Content of a repository at one commit."""

    sha: str
    private: bool
    files: list[str]

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, as paths in the repository, newest first."""
        folders = {Path(file).parent for file in self.files if STEP_FILE.fullmatch(file)}
        return sorted(folders, key=checkpoint.step_of, reverse=True)

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint, 0 if there is none."""
        return checkpoint.step_of(self.checkpoints[0]) if self.checkpoints else 0


def client() -> "HfApi":
    """Return the Hub's client, set to give up on a connection that stays silent."""
    from huggingface_hub import HfApi, get_session

    get_session().timeout = NETWORK_TIMEOUT
    return HfApi()


def look(repo_id: str) -> Remote:
    """List the repository. Raises UserError if it does not hold a pushed run."""
    info = client().model_info(repo_id)
    remote = Remote(info.sha, info.private, [file.rfilename for file in info.siblings])
    is_model = "model.safetensors" in remote.files
    if is_model or (not remote.checkpoints and {run_files.CONFIG, run_files.METRICS} & set(remote.files)):
        raise UserError(
            f"--push-to-hub {repo_id}: holds something other than a pushed run: name another repository"
        )
    return remote


def check_same_run(repo_id: str, remote: Remote, out_dir: Path) -> None:
    """Raise UserError if the metrics in the repository belong to another run than those in the run folder.

    Two runs differ in the first step that they record, at least in its duration.
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
