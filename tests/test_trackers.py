"""--track: a tracker sees what metrics.jsonl has, over all resumes as one run, and ends no run if it fails.

Modules with their interface stand in for the services. TensorBoard's own reader is used if it is there.
"""

import dataclasses
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from helpers import history

from settings import PRESETS, check_settings
from support import metrics
from support.cli import UserError

Train = Callable[..., Path]


class ServiceRun:
    """One run in wandb or trackio: rows of values by the step that curves are drawn over."""

    def __init__(self, config: dict[str, object]) -> None:
        self.config, self.rows, self.step_metric, self.finished = config, [], {}, False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.step_metric[name] = step_metric

    def finish(self) -> None:
        self.finished = True

    def losses(self) -> dict[int, float]:
        return {step: values["train/loss"] for step, values in self.rows if "train/loss" in values}


class WandbRun(ServiceRun):
    def log(self, data: dict[str, float]) -> None:
        assert self.step_metric["*"] == "step", "else curves are drawn over the number of calls"
        assert not self.finished
        self.rows.append((data["step"], data))


class TrackioRun(ServiceRun):
    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert not {"step", "time", "run", "project", "timestamp", "metrics"} & set(metrics), "reserved"
        assert not self.finished
        self.rows.append((step, metrics))


class Service(types.ModuleType):
    """A module with the interface of wandb or trackio, and all runs that it was given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None, origin="stub")
        self.runs: dict[str, ServiceRun] = {}

    def begin(self, name: str | None, resume: str | None, run: ServiceRun) -> ServiceRun:
        if name is None or resume != "allow":
            name = f"another-{len(self.runs)}"
        self.runs.setdefault(name, run).finished = False
        return self.runs[name]


class Wandb(Service):
    def init(
        self, *, project: str, config: dict, id: str = "", name: str = "", dir: str = "", resume: str = ""
    ) -> ServiceRun:
        assert Path(dir).is_dir() and not set(id) & set("/\\#?%:")
        return self.begin(id or None, resume, WandbRun(config))


class Trackio(Service):
    def init(self, project: str, name: str = "", config: dict | None = None, resume: str = "") -> ServiceRun:
        self.current = self.begin(name or None, resume, TrackioRun(config))
        return self.current

    def finish(self) -> None:
        self.current.finish()


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    made = [Wandb("wandb"), Trackio("trackio")]
    for service in made:
        monkeypatch.setitem(sys.modules, service.__name__, service)
    return made


def go_back(run: Path, step: int) -> None:
    """Leave the run as a kill some steps after this checkpoint would."""
    for folder in (run / "checkpoints").iterdir():
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)


def test_a_resumed_run_continues_its_tracked_run(train: Train, services: list[Service]) -> None:
    run = train("my run #1", track="wandb, trackio")
    go_back(run, 2)
    train("my run #1", track="wandb,trackio", resume=True)
    records = metrics.read(run / "metrics.jsonl")
    for service in services:
        [tracked] = service.runs.values()
        assert tracked.losses() == {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
        val = {step: values["val/loss"] for step, values in tracked.rows if "val/loss" in values}
        assert val == {r["step"]: r["loss"] for r in records if r["kind"] == "val"}
        assert tracked.config["settings"]["n_embd"] == 16
        assert tracked.finished
    assert [r for r in records if r.get("name") == "settings changed"] == []


def test_a_new_run_in_the_folder_gets_a_new_tracked_run(train: Train, services: list[Service]) -> None:
    train(track="wandb,trackio", max_steps=1)
    run = train(track="wandb,trackio", max_steps=2, overwrite=True)
    for service in services:
        assert [len(tracked.losses()) for tracked in service.runs.values()] == [1, 2]
    assert json.loads((run / "config.json").read_text())["name"] == list(services[0].runs)[1]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_dropped(
    train: Train,
    services: list[Service],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    where: str,
) -> None:
    expected = history(train("without"))
    wandb, trackio = services
    calls = []

    def fail(*args: object, **kwargs: object) -> None:
        calls.append(where)
        if where != "log" or len(calls) == 5:
            raise ConnectionError("the service is down\nand more")

    monkeypatch.setattr(wandb if where == "init" else WandbRun, where, fail)
    capsys.readouterr()
    run = train("run", track="wandb,trackio")
    assert history(run) == expected
    assert capsys.readouterr().err.splitlines() == [
        "warning: --track wandb: ConnectionError: the service is down: training continues without it"
    ]
    events = [r for r in metrics.read(run / "metrics.jsonl") if r.get("name") == "tracker failed"]
    assert len(events) == 1
    assert (events[0]["tracker"], events[0]["reason"]) == ("wandb", "ConnectionError: the service is down")
    assert len(calls) == (5 if where == "log" else 1)
    [tracked] = trackio.runs.values()
    assert sorted(tracked.losses()) == [1, 2, 3, 4, 5, 6] and tracked.finished


def test_a_missing_tracker_is_noticed_before_anything_is_deleted(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train()
    expected = history(run)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="--track trackio: its package is missing: pip install trackio"):
        train(overwrite=True, track="trackio")
    with pytest.raises(UserError, match="--track wandb2: wandb2 is not one of tensorboard, wandb, trackio"):
        train(overwrite=True, track="wandb2")
    assert history(run) == expected


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_folder_called_wandb_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb leaves one where it was started."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UserError, match="its package is missing: pip install wandb"):
        check_settings(dataclasses.replace(PRESETS["demo"], track="wandb"), 1)


class SummaryWriter:
    """The part of torch's that is used; curves are drawn from what the folder holds, as TensorBoard does."""

    folders: dict[str, dict[tuple[str, int], list[float]]] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, log_dir: str, purge_step: int | None = None, flush_secs: int = 120) -> None:
        before = self.folders.get(log_dir, {})
        kept = {key: value for key, value in before.items() if purge_step is None or key[1] < purge_step}
        self.events = self.folders[log_dir] = kept

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.events.setdefault((tag, step), []).append(value)

    def close(self) -> None:
        self.events[("closed", -1)] = [1.0]


def test_tensorboard_shows_each_step_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    tensorboard = types.ModuleType("tensorboard")
    tensorboard.__spec__ = ModuleSpec("tensorboard", loader=None, origin="stub")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", tensorboard)
    monkeypatch.setattr(SummaryWriter, "folders", {})
    run = train(track="tensorboard")
    go_back(run, 2)
    train(track="tensorboard", resume=True)
    [(folder, events)] = SummaryWriter.folders.items()
    assert folder == str(run / "tensorboard")
    for kind in ("train", "val"):
        expected = {r["step"]: [r["loss"]] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == kind}
        assert {step: values for (tag, step), values in events.items() if tag == f"{kind}/loss"} == expected
    assert ("closed", -1) in events


def test_tensorboards_own_reader_sees_each_step_once(train: Train) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(track="tensorboard")
    go_back(run, 2)
    train(track="tensorboard", resume=True)
    read = reader.EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    for kind in ("train", "val"):
        expected = [(r["step"], r["loss"]) for r in metrics.read(run / "metrics.jsonl") if r["kind"] == kind]
        found = [(event.step, event.value) for event in read.Scalars(f"{kind}/loss")]
        assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    train(track="tensorboard", overwrite=True, max_steps=1)
    assert len(list((run / "tensorboard").iterdir())) == 1
