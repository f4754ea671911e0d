"""Figures: what the curves are drawn from."""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import ROOT, environment, posix
from matplotlib import font_manager
from matplotlib.figure import Figure

import plot_loss
from support.cli import UserError

TRAIN = [{"step": step, "kind": "train", "loss": 5.0 - step, "lr": 1e-3} for step in range(3)]
SCORES = [{"step": step, "kind": "hellaswag", "acc": 0.3, "acc_norm": 0.3} for step in range(3)]
START = [{"step": 0, "kind": "event", "name": "start"}]


def write_run(folder: Path, records: list[dict[str, object]] = TRAIN) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved so far. Their files have other contents, as drawing takes most of the time."""
    saved = []

    def save(figure: Figure, out: Path) -> None:
        saved.append(figure)
        Path(out).write_bytes(b"figure")

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def legend(figure: Figure) -> list[str]:
    """The texts of all legends, top to bottom."""
    legends = [axis.get_legend() for axis in figure.axes]
    return [text.get_text() for found in legends if found for text in found.get_texts()]


def run_main(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_loss.py", *map(str, args)])
    plot_loss.main()


def test_read_run_returns_the_recorded_curves(train: Callable[..., Path]) -> None:
    run = train()
    curves = plot_loss.read_run(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, kind, key in (("train", "train", "loss"), ("val", "val", "loss"), ("lr", "train", "lr")):
        steps, values = curves[name]
        expected = [(r["step"], r[key]) for r in records if r["kind"] == kind]
        assert list(zip(steps.tolist(), values.tolist(), strict=True)) == expected


def test_a_plain_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("0 val 10.95\n0 hella 0.2463\n0 train 10.955029\n\n1 train 9.5\n250 hella 0.26\n")
    curves = plot_loss.read_run(log)
    assert {name: [c.tolist() for c in columns] for name, columns in curves.items()} == {
        "val": [[0], [10.95]],
        "hellaswag": [[0, 250], [0.2463, 0.26]],
        "train": [[0, 1], [10.955029, 9.5]],
    }


def test_moving_average_is_centred() -> None:
    values = np.random.default_rng(0).random(50)
    values[7] = np.nan
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(50)]
    np.testing.assert_allclose(plot_loss._moving_average(values, 5), expected)
    ramp = np.arange(50.0)
    np.testing.assert_allclose(plot_loss._moving_average(ramp, 7)[3:-3], ramp[3:-3])  # no lag
    np.testing.assert_allclose(plot_loss._moving_average(values, 1)[8:], values[8:])


def test_several_runs_share_one_figure(train: Callable[..., Path], tmp_path: Path) -> None:
    """Two runs, a baseline of one evaluation and a plain log, in a vector figure whose text can be read."""
    run = train("first")
    train("second", seed=2)
    train("baseline", init_from=str(run), max_steps=0)
    (tmp_path / "old.txt").write_text("0 train 10\n5 train 9\n0 hella 0.25\n5 hella 0.26\n")
    runs = [tmp_path / name for name in ("first", "second", "baseline", "old.txt")]
    out = plot_loss.plot(runs, tmp_path / "deep" / "figure.svg", log_x=True, smooth=3)
    svg = out.read_text()
    for text in (
        "first: training",
        "second: training",
        "baseline: validation",
        "HellaSwag acc_norm",
        "chance",
        "step",
    ):
        assert f"<!-- {text}" in svg, text
    assert plot_loss.plot_run(run) == run / "loss_curves.png"


def test_step_ticks_are_whole_and_averages_share_a_width(train: Callable[..., Path], tmp_path: Path) -> None:
    """Ticks at whole steps where there is nothing but step 0; compared runs averaged over the same span."""
    train("baseline", max_steps=0)
    svg = plot_loss.plot([tmp_path / "baseline"], tmp_path / "a.svg").read_text()
    assert {tick for tick in ("-0", "0.5", "0.25") if f"<!-- {tick} -->" in svg} == set()
    assert "<!-- 0 -->" in svg and "<!-- 1 -->" in svg
    for name, length in (("long.txt", 500), ("short.txt", 100)):
        (tmp_path / name).write_text("".join(f"{step} train 5\n" for step in range(length)))
    svg = plot_loss.plot([tmp_path / "long.txt", tmp_path / "short.txt"], tmp_path / "b.svg").read_text()
    assert svg.count("mean of 10 steps -->") == 2


@pytest.mark.parametrize(
    ("last", "peak", "first"),
    [(2000, 0, 100), (2000, 500, 500), (2000, 1900, 1000), (19, 0, 0)],
    ids=["5 %", "warm-up", "half", "short run"],
)
def test_the_loss_axis_leaves_out_the_warmup(
    last: int, peak: int, first: int, tmp_path: Path, figures: list[Figure]
) -> None:
    """From a loss of 11 to one of 3, with the peak learning rate at step `peak`."""
    losses = [3 + 8 * np.exp(-step / (last / 4)) for step in range(last + 1)]
    records = [
        {"step": step, "kind": "train", "loss": losses[step], "lr": 1 - abs(step - peak) / last}
        for step in range(last + 1)
    ]
    records += [{"step": step, "kind": "val", "loss": losses[step]} for step in (0, last)]
    plot_loss.plot([write_run(tmp_path / "run", records)], tmp_path / "figure.png", smooth=1)
    bottom, top = figures[0].axes[0].get_ylim()
    margin = 0.05 * (losses[first] - losses[-1])
    assert (bottom, top) == pytest.approx((losses[-1] - margin, losses[first] + margin))


def test_the_title_names_model_machine_and_time(train: Callable[..., Path], figures: list[Figure]) -> None:
    run = train()
    config = json.loads((run / "config.json").read_text())
    config["parameters"], config["hardware"] = 124_439_808, {"processes": 8, "name": "H100"}
    (run / "config.json").write_text(json.dumps(config))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"step_ms": 30_000} if record["kind"] == "train" else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_loss.plot([run], run / "a.png")
    minutes = sum(record["kind"] == "train" for record in records) / 2
    title = f"GPT-2 with 124 million parameters, 8 x H100, {minutes:.1f} minutes of training"
    assert figures[-1].get_suptitle() == title
    (run / "config.json").write_text('{"settings": {}, "parameters": "many"}')
    plot_loss.plot([run], run / "a.png")
    assert figures[-1].get_suptitle() == f"{minutes:.1f} minutes of training"
    (run / "config.json").write_text(json.dumps(config))
    (run / "other.txt").write_text("0 train 5\n1 train 4\n")
    plot_loss.plot([run / "other.txt"], run / "a.png")  # a log of something else in the same folder
    assert figures[-1].get_suptitle() == ""


def test_validation_losses_are_points_without_a_line(tmp_path: Path, figures: list[Figure]) -> None:
    records = TRAIN + [{"step": step, "kind": "val", "loss": 5.0} for step in (0, 2)]
    plot_loss.plot([write_run(tmp_path / "run", records)], tmp_path / "a.png")
    [line] = [line for line in figures[0].axes[0].get_lines() if line.get_ydata().tolist() == [5.0, 5.0]]
    assert (line.get_linestyle(), line.get_marker()) == ("None", "o")


# ---------------------------------------------------------------- names of runs


NAMES = [
    "_a",
    "__",
    "_nolegend_",
    "$b",
    "$x$",
    r"\frac",
    "a^{b}",
    "%s",
    "{d",
    "a--b",
    " c",
    "metrics.jsonl",
    "x.txt",
]


@posix
def test_the_legend_shows_every_name_unchanged(tmp_path: Path, figures: list[Figure]) -> None:
    """In every panel: of a run that trains, of one that was only scored, of one that was scored once."""
    runs = [write_run(tmp_path / name, TRAIN + SCORES) for name in NAMES]
    runs.append(write_run(tmp_path / "_scored", SCORES))
    runs.append(write_run(tmp_path / "_baseline", [{"step": 0, "kind": "val", "loss": 4.0}, SCORES[0]]))
    plot_loss.plot(runs, tmp_path / "a.png")
    shown = [f"{name}: training" for name in NAMES] + ["_baseline: validation, last 4.0000"]
    assert legend(figures[0]) == [*shown, "_scored", "_baseline", "OpenAI's GPT-2 124M", "chance"]
    plot_loss.plot(runs[-1:], tmp_path / "a.png")
    assert "_baseline" in legend(figures[1])


def test_dollars_in_a_name_are_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    """As mathematics, $x$ would be an x of the same width; a lone backslash or brace would be an error."""
    runs = [write_run(tmp_path / name) for name in ("$x$", "x", "$x{$")]
    plot_loss.plot(runs, tmp_path / "a.png")
    texts = figures[0].axes[0].get_legend().get_texts()
    dollars, plain, brace = (text.get_window_extent().width for text in texts)
    assert plain + 10 < dollars < brace


@posix
def test_characters_that_cannot_be_drawn_are_escaped(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [write_run(tmp_path / name) for name in ("a\nb", "a\x1bb", os.fsdecode(b"a\xffb"), r"a\nb")]
    plot_loss.plot(runs, tmp_path / "a.png")
    names = [r"a\nb (run 1)", r"a\x1bb", r"a\udcffb", r"a\nb (run 4)"]
    assert legend(figures[0]) == [f"{name}: training" for name in names]


def test_labels_tell_runs_apart(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p/x", "q/x", "y", "metrics.jsonl"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path / "p/x")
    for runs, expected in (
        ([".", "../../y/"], ["x", "y"]),
        (["metrics.jsonl", "../../y/metrics.jsonl"], ["x", "y"]),
        (["../../metrics.jsonl", "../../y/../y"], ["metrics.jsonl", "y"]),
        (["../x", "../../q/x"], [os.path.join("..", "x"), os.path.join("..", "..", "q", "x")]),
        ([".", "../../q/x"], [str(tmp_path / "p" / "x"), os.path.join("..", "..", "q", "x")]),
        (["../../y", "../../y"], [os.path.join("..", "..", "y") + f" (run {number})" for number in (1, 2)]),
    ):
        plot_loss.plot([Path(run) for run in runs], tmp_path / "a.png")
        assert legend(figures[-1]) == [f"{name}: training" for name in expected]


def write_font(path: Path, character: str, name: str, empty: bool = False) -> str:
    """Write a font with one character: a square, or nothing, as in a font of coloured emoji."""
    pen = TTGlyphPen(None)
    if not empty:
        pen.moveTo((0, 0))
        for corner in ((0, 900), (900, 900), (900, 0)):
            pen.lineTo(corner)
        pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": name, "styleName": "Regular", "psName": name})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return str(path)


def test_names_without_a_font_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    empty = write_font(tmp_path / "empty.ttf", "实", "Empty", empty=True)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [empty, str(tmp_path / "missing.ttf")])
    runs = [write_run(tmp_path / name, TRAIN[:1]) for name in ("实", "验", "a")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plot_loss.plot(runs, tmp_path / "a.svg").read_text(encoding="utf-8")
    for label in ("实 (run 1): training", "验 (run 2): training", "a: training"):
        assert f"<!-- {label} -->" in svg
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "实验" in shown and "install Noto Sans CJK" in shown
    plot_loss.plot(runs[:1], tmp_path / "a.svg")  # the figure of one run does not have its name
    assert capsys.readouterr().err == ""


def test_names_are_drawn_in_any_font_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fonts = [
        write_font(tmp_path / f"{name}.ttf", c, name) for name, c in (("ProbeA", "实"), ("ProbeB", "验"))
    ]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    runs = [write_run(tmp_path / name, TRAIN[:1]) for name in ("实验", "a")]
    svg = plot_loss.plot(runs, tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<!-- 实验: training -->" in svg and "#ProbeA" in svg and "#ProbeB" in svg
    assert capsys.readouterr().err == ""


def test_the_legend_of_many_runs_leaves_room_for_curves(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [write_run(tmp_path / f"{'long' * 40 * (number == 7)}{number}") for number in range(40)]
    plot_loss.plot(runs, tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures[0].draw_without_rendering()
    axis = figures[0].axes[0]
    box = axis.get_legend().get_window_extent()
    assert axis.bbox.width > 1000 and axis.bbox.height > 300
    assert axis.bbox.y0 <= box.y0 and box.y1 <= axis.bbox.y1
    assert len(axis.get_legend().get_texts()) == 40


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (None, "run/loss_curves.png"),
        ("figure", "figure.png"),
        ("figure.", "figure..png"),
        ("folder", "folder/loss_curves.png"),
        ("folder/", "folder/loss_curves.png"),
        ("new/", "new/loss_curves.png"),
        ("new.v2/", "new.v2/loss_curves.png"),
        ("new/deep/a.pdf", "new/deep/a.pdf"),
        ("A.PNG", "A.PNG"),
        ("a.jpg", "a.jpg"),
    ],
)
def test_the_printed_path_is_the_figure(
    out: str | None, expected: str, tmp_path: Path, figures: list[Figure],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, "run", *([] if out is None else ["--out", out]))
    assert capsys.readouterr().out == str(Path(expected)) + "\n"
    assert Path(expected).read_bytes() == b"figure"
    assert not list(tmp_path.rglob(".tmp*"))


@pytest.mark.parametrize(("suffix", "start"), [("PNG", b"\x89PNG"), ("JPG", b"\xff\xd8"), ("Pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(suffix: str, start: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 0, "kind": "val", "loss": 4.0}])
    assert plot_loss.plot([run], tmp_path / f"a.{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--out", "a.xyz"], "--out a.xyz: no figure can be saved as .xyz: use .png, .pdf, .svg"),
        (["run", "--out", "run/metrics.jsonl/a.png"], "metrics.jsonl/a.png: cannot be written"),
        (["run", "--out", "run/metrics.jsonl/b/a.png"], "b/a.png: cannot be written"),
        (["run", "--out", "x" * 300], "x.png: cannot be written"),
        (["run", "--smooth", "-1"], "--smooth -1: must be at least 0"),
        (["run", "started"], "started/metrics.jsonl: contains no losses to draw yet"),
        (["x" * 300], "no run there"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    args: list[str], message: str, tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    write_run(tmp_path / "started", START)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        run_main(monkeypatch, *args)
    assert message in str(error.value).replace("\\", "/") and "\n" not in str(error.value)
    assert "File exists" not in str(error.value)  # said of a folder in the figure's path
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_figure_that_cannot_be_saved_leaves_the_earlier_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(figure: Figure, out: Path) -> None:
        Path(out).write_bytes(b"half")
        raise OSError(number, os.strerror(number), str(out))

    run = write_run(tmp_path / "run")
    (run / "loss_curves.png").write_bytes(b"earlier")
    monkeypatch.setattr(Figure, "savefig", save)
    with pytest.raises(UserError, match=r"--out .*loss_curves.png: cannot be written \([A-Z]"):
        run_main(monkeypatch, run)
    assert (run / "loss_curves.png").read_bytes() == b"earlier"
    assert {path.name for path in run.iterdir()} == {"loss_curves.png", "metrics.jsonl"}


@pytest.mark.parametrize("smooth", [2, 3, 1000, 10**30])
def test_smooth_accepts_any_width(smooth: int, tmp_path: Path, figures: list[Figure]) -> None:
    plot_loss.plot([write_run(tmp_path / "run")], tmp_path / "a.png", smooth=smooth)
    smoothed = figures[0].axes[0].get_lines()[1].get_ydata()  # of the losses 5, 4, 3
    assert smoothed.tolist() == {2: [4.5, 3.5, 3.0], 3: [4.5, 4.0, 3.5]}.get(smooth, [4.0, 4.0, 4.0])
    assert legend(figures[0]) == [f"training, mean of {smooth} steps"]


@pytest.mark.parametrize(
    "records", [TRAIN + SCORES, TRAIN[:1], SCORES, SCORES[:1], [{**TRAIN[0], "loss": None}]]
)
def test_runs_of_any_kind_are_drawn_without_a_warning(
    records: list[dict[str, object]], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_loss.plot([run], tmp_path / "a.png", log_x=True).stat().st_size > 1000


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
    ids=["utf-8-sig", "utf-16-le", "utf-16-be", "windows", "old mac"],
)
def test_plain_logs_of_any_editor_are_read(encode: Callable[[str], bytes], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(encode("0 train 5.0\n\n \n1 train 4.5\n"))
    assert [column.tolist() for column in plot_loss.read_run(log)["train"]] == [[0, 1], [5.0, 4.5]]
    log.write_bytes(encode("0 train 5.0\x0c\nx\n"))  # a form feed, which splitlines would count
    with pytest.raises(UserError, match="line 2 is not"):
        plot_loss.read_run(log)


def test_the_metrics_file_may_have_capitals_in_its_name(tmp_path: Path, figures: list[Figure]) -> None:
    record = write_run(tmp_path / "run") / "metrics.jsonl"
    record = record.rename(record.with_name("METRICS.JSONL"))
    plot_loss.plot([record, write_run(tmp_path / "other.jsonl")], tmp_path / "a.png")
    assert legend(figures[0]) == ["run: training", "other.jsonl: training"]


# ---------------------------------------------------------------- environment


@posix
@pytest.mark.parametrize(
    ("backend", "folder", "kept"), [("nonsense", "MPLCONFIGDIR", ""), ("svg", "XDG_CONFIG_HOME", "svg")]
)
def test_figures_do_not_depend_on_the_environment(
    backend: str, folder: str, kept: str, tmp_path: Path
) -> None:
    """A backend that is not there, a folder that is a file. A backend that is there stays the notebook's."""
    write_run(tmp_path / "run")
    script = (
        "import os, sys, pathlib, plot_loss\n"
        "assert 'matplotlib' not in sys.modules\n"
        "before = dict(os.environ)\n"
        "plot_loss.plot_run(pathlib.Path('run'))\n"
        "assert dict(os.environ) == before\n"
        "import matplotlib\n"
        "print(matplotlib.get_backend() if before['MPLBACKEND'] == 'svg' else '')\n"
    )
    config = tmp_path / "file"
    config.touch()
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(), "PYTHONPATH": str(ROOT), "MPLBACKEND": backend, folder: str(config)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
    )
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", kept)
    assert (tmp_path / "run" / "loss_curves.png").stat().st_size > 1000
