"""Figures from what runs leave behind in JSON, readable in black and white: markers, line styles
and hatches tell curves apart.

    ship-ds plot --run runs/quickstart --runs runs/half runs/quarter

Each figure is one function of run folders. It raises NotDrawn, saying which command makes what it
lacks.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ship_ds.config import parse_config
from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.files import whole_file
from ship_ds.parsing import read_json_lines, read_json_object

_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "x", "D", "v", "+")
_GREYS = ("0.0", "0.35", "0.6")
_KINDS = {"encoded": ("o", "white"), "trained": ("x", "black"), "re-encoded": ("s", "0.6")}
"""Of latents: marker and fill."""
_FEWEST_TASKS = 10
"""That a map of all tasks is drawn of."""
_MEASURES = {
    "deduction": ("deduction", "exact_match"),
    "induction": ("induction", "execution_accuracy"),
    "reasoning": ("reasoning", "exact_match"),
}
"""What stands for each direction where one curve has to."""


_TRAINED_ON = (
    "steps",
    "epochs",
    "tasks_per_step",
    "examples_per_task",
    "family_alpha",
    "balances_labels",
    "max_minutes",
)
"""What of the training section decides what a run comes to."""


class NotDrawn(UserError):  # noqa: N818
    """What the figure needs is not there."""


def losses(runs: Sequence[Path]) -> Figure:
    """Every objective of the first run over its steps, each step and smoothed over fifty."""
    rows = read_json_lines(_there(runs[0] / "metrics.jsonl", "train it first"))
    # a key each, whatever the run was trained on; the total mixes units
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("loss/"))
    names.pop("loss/total", None)
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [row["step"] for row in rows]
    for index, name in enumerate(names):
        # a value that was not finite is null in JSON
        losses = np.array([np.nan if row.get(name) is None else row[name] for row in rows])
        label = name.removeprefix("loss/").replace("_", " ")
        line = _LINES[index % len(_LINES)]
        axes.plot(steps, losses, color="0.85", linewidth=0.5)
        axes.plot(
            steps, _smoothed(losses), linestyle=line, color="black", label=label, linewidth=1.2
        )
    axes.set(xlabel="training step", ylabel="loss (nats)", yscale="log")
    axes.legend(frameon=False)
    return figure


def _smoothed(values: np.ndarray[Any, Any], width: int = 50) -> list[float]:
    """The mean of the finite values around each step."""
    windows = (values[max(0, i - width // 2) : i + width // 2] for i in range(len(values)))
    return [
        float(np.nanmean(window)) if np.isfinite(window).any() else float("nan")
        for window in windows
    ]


def latents(runs: Sequence[Path]) -> Figure:
    """t-SNE (van der Maaten & Hinton 2008) of a few tasks' latents: a letter a task, a marker for
    where a latent is from."""
    from sklearn.manifold import TSNE

    path = runs[0] / "evaluation" / "latents.json"
    points = read_json_object(_there(path, "`ship-ds plot` makes it from the bundle"))["points"]
    latents = np.array([point["latent"] for point in points])
    perplexity = min(15, (len(points) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(latents)
    figure, axes = plt.subplots(figsize=(7.5, 5.5))
    tasks = list(dict.fromkeys(point["instruction"] for point in points))
    for kind, (marker, fill) in _KINDS.items():
        of_kind = [i for i, point in enumerate(points) if point["kind"] == kind]
        axes.plot(
            places[of_kind, 0],
            places[of_kind, 1],
            linestyle="",
            marker=marker,
            markerfacecolor=fill,
            markeredgecolor="black",
            markersize=5.5,
            markeredgewidth=0.8,
            label=kind,
        )
    for letter, task in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", tasks, strict=False):
        of_task = [
            i
            for i, point in enumerate(points)
            if point["instruction"] == task and point["kind"] == "encoded"
        ]
        x, y = np.median(places[of_task], axis=0)
        axes.annotate(
            letter, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=11, weight="bold"
        )
        for i, point in enumerate(points):
            if point["instruction"] == task and point["kind"] != "encoded":
                axes.annotate(
                    letter, places[i], xytext=(3.5, 3), textcoords="offset points", fontsize=6
                )
        axes.plot([], [], " ", label=f"{letter}: {task}")
    axes.set(xlabel="t-SNE axis 1 (no unit)", ylabel="t-SNE axis 2 (no unit)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def categories(runs: Sequence[Path]) -> Figure:
    """t-SNE of every task's latent: a marker for each of the largest categories, dots for the
    others, filled where training never saw the task."""
    from sklearn.manifold import TSNE

    path = runs[0] / "evaluation" / "latents.json"
    tasks = read_json_object(_there(path, "`ship-ds plot` makes it from the bundle")).get(
        "tasks", []
    )
    names = [task["category"] for task in tasks]
    largest = [name for name, _ in Counter(names).most_common(len(_MARKERS))]
    if len(largest) < 2 or len(tasks) < _FEWEST_TASKS:
        raise NotDrawn(f"{runs[0]}: its tasks have no two categories, or are few")
    latents = np.array([task["latent"] for task in tasks])
    perplexity = min(30, (len(tasks) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(latents)
    figure, axes = plt.subplots(figsize=(7.5, 6))
    others = [i for i, name in enumerate(names) if name not in largest]
    axes.plot(*places[others].T, ".", color="0.75", markersize=3, label="other categories")
    for name, marker in zip(largest, _MARKERS, strict=False):
        for is_seen in (True, False):
            chosen = [
                i
                for i, task in enumerate(tasks)
                if task["category"] == name and (task["part"] == "seen") == is_seen
            ]
            axes.plot(
                *places[chosen].T,
                linestyle="",
                marker=marker,
                color="black",
                markerfacecolor="white" if is_seen else "black",
                markersize=5,
                markeredgewidth=0.8 if is_seen else 1.6,
                label=f"{name} ({names.count(name)})" if is_seen else None,
            )
    alike, chance = _share_of_like_neighbours(latents, names)
    axes.set_title(
        f"nearest other task of the same category: {alike:.0%}, by chance {chance:.0%}", fontsize=10
    )
    axes.set(xlabel="t-SNE axis 1 (no unit)", ylabel="t-SNE axis 2 (no unit)")
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=8,
        title="seen; dev and unseen are filled",
        title_fontsize=8,
    )
    return figure


def _share_of_like_neighbours(
    latents: np.ndarray[Any, Any], names: Sequence[str]
) -> tuple[float, float]:
    """How often a task's nearest other one is of its category, and how often any other one is."""
    squares = (latents**2).sum(1)
    distances = squares[:, None] + squares - 2 * latents @ latents.T
    np.fill_diagonal(distances, np.inf)
    like = [names[other] == name for name, other in zip(names, distances.argmin(1), strict=True)]
    counts = Counter(names)
    pairs = sum(count * (count - 1) for count in counts.values())
    return sum(like) / len(names), pairs / (len(names) * (len(names) - 1))


def shown_examples(runs: Sequence[Path]) -> Figure:
    """Induction's execution accuracy of the first run's methods against the number of observed
    examples, seen beside unseen."""
    methods = _report(runs[0])["methods"]
    curves = {
        (name, part): method["induction"][part]["by_num_shown"]
        for name, method in methods.items()
        if "induction" in method
        for part in ("seen", "unseen")
        if len(method["induction"].get(part, {}).get("by_num_shown", {})) > 1
    }
    if not curves:
        raise NotDrawn(
            f"{runs[0]}: one number of shown examples alone; ship-ds evaluate "
            "--num-shown 5,1,2,3 measures more"
        )
    parts = [
        part for part in ("seen", "unseen") if any(part == curve_part for _, curve_part in curves)
    ]
    figure, all_axes = plt.subplots(
        1, len(parts), figsize=(4.5 * len(parts), 4), sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(name for name, _ in curves))
    numbers = sorted({int(x) for cells in curves.values() for x in cells})
    for axes, part in zip(all_axes[0], parts, strict=True):
        for index, name in enumerate(names):
            cells = curves.get((name, part), {})
            xs = sorted(map(int, cells))
            _curve(axes, xs, [cells[str(x)].get("execution_accuracy") for x in xs], index, name)
        axes.set(xlabel="observed examples", title=f"{part} rules", xticks=numbers)
    _as_accuracy(all_axes[0][0], "induction: execution accuracy (%)")
    all_axes[0][-1].legend(frameon=False, fontsize=8)
    return figure


def training_rules(runs: Sequence[Path]) -> Figure:
    """Each direction's accuracy against the share of the training rules that a run was trained
    on."""
    runs = _alike(runs, ("data", "num_seen"))
    counts = {
        run: len(read_json_object(_there(run / "splits.json", "train it first"))["seen"])
        for run in runs
    }
    return _over_runs(
        runs,
        {run: 100 * count / max(counts.values()) for run, count in counts.items()},
        f"training rules (% of {max(counts.values())})",
        "numbers of training rules",
    )


def reconstruction_weight(runs: Sequence[Path]) -> Figure:
    """Each direction's accuracy, and how often the decoder gives an instruction back from its own
    latent, against the weight of the reconstruction loss."""
    runs = _alike(runs, ("loss", "reconstruction"))
    weights = {
        run: read_json_object(_there(run / "config.json", "train it first"))["loss"][
            "reconstruction"
        ]
        for run in runs
    }
    figure = _over_runs(
        runs, weights, "weight of the reconstruction loss (no unit)", "weights of reconstruction"
    )
    ticks = sorted(set(weights.values()))
    smallest = next(weight for weight in ticks if weight > 0)
    for axes in figure.axes:
        # a weight of 0 stands at the left of the decades
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        axes.set_xticks(ticks, [f"{weight:g}" for weight in ticks])
        axes.minorticks_off()
        axes.set_xlim(ticks[0] - smallest / 3, ticks[-1] * 1.4)
    return figure


def _alike(runs: Sequence[Path], key: tuple[str, str]) -> list[Path]:
    """The runs that were trained as the first one but for `key` and the seed: no other difference
    is drawn as its."""

    def without_key(run: Path) -> dict[str, Any]:
        written = read_json_object(_there(run / "config.json", "train it first"))
        # parsed, so that a run of an earlier version has the defaults of keys that it did not know
        config: dict[str, Any] = parse_config(written, str(run)).model_dump(mode="json")
        trained = {name: config.get(name, {}) for name in ("data", "model", "loss", "optimiser")}
        training = {name: config.get("training", {}).get(name) for name in _TRAINED_ON}
        start = config.get("run", {}).get("init_from")
        section = {name: value for name, value in trained[key[0]].items() if name != key[1]}
        return {**trained, "training": training, "init_from": start, key[0]: section}

    return [run for run in runs if without_key(run) == without_key(runs[0])]


def _over_runs(runs: Sequence[Path], xs: Mapping[Path, float], label: str, what: str) -> Figure:
    """SHIP's seen and unseen accuracy over runs; runs at the same x, seeds, are points around their
    median."""
    if len(set(xs.values())) < 2:
        raise NotDrawn(
            f"{', '.join(map(str, runs))}: no two {what}; give runs that differ in it by --runs"
        )
    cells = {run: _report(run)["methods"].get("ship", {}) | _reconstruction(run) for run in runs}
    figure, all_axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, part in zip(all_axes, ("seen", "unseen"), strict=True):
        measures = {**_MEASURES, "reconstruction": ("reconstruction", "exact_match")}
        for index, (name, (direction, metric)) in enumerate(measures.items()):
            values: dict[float, list[float]] = {}
            for run in runs:
                cell = cells[run].get(direction, {}).get(part, {}).get(metric)
                if _is_measured(cell):
                    values.setdefault(xs[run], []).append(cell["value"])
            for x, of_seeds in values.items():
                axes.scatter(
                    [x] * len(of_seeds), of_seeds, marker=_MARKERS[index], color="0.6", s=14
                )
            ordered = sorted(values)
            if not ordered:
                continue
            axes.plot(
                ordered,
                [statistics.median(values[x]) for x in ordered],
                linestyle=_LINES[index],
                marker=_MARKERS[index],
                color="black",
                label=name,
                markersize=5,
                linewidth=1,
                clip_on=False,
            )
        axes.set(xlabel=label, title=f"{part} rules")
        axes.set_xticks(sorted(set(xs.values())), [f"{x:.0f}" for x in sorted(set(xs.values()))])
    _as_accuracy(all_axes[0], "accuracy (%)")
    all_axes[1].legend(frameon=False)
    return figure


def _reconstruction(run: Path) -> dict[str, Any]:
    """From the report that ends a training, which has it over all rules; a run may be without."""
    path = run / "report.json"
    report = read_json_object(path) if path.is_file() else {}
    return {name: cells for name, cells in report.items() if name == "reconstruction"}


def comparison(runs: Sequence[Path]) -> Figure:
    """The first run's methods as bars with their 95 % intervals, seen beside unseen, a panel a
    direction."""
    methods = _report(runs[0])["methods"]
    panels = {name: [m for m in methods if name in methods[m]] for name in _MEASURES}
    panels = {name: drawn for name, drawn in panels.items() if drawn}
    if not panels:
        raise NotDrawn(f"{runs[0]}: none of {', '.join(_MEASURES)} was measured")
    heights = [len(drawn) + 1 for drawn in panels.values()]
    figure, all_axes = plt.subplots(
        len(panels),
        1,
        figsize=(7, 0.42 * sum(heights) + 1),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    for axes, (name, drawn) in zip(all_axes[:, 0], panels.items(), strict=True):
        direction, metric = _MEASURES[name]
        for offset, part, hatch, fill in (
            (-0.2, "seen", "", "0.75"),
            (0.2, "unseen", "////", "white"),
        ):
            cells = [methods[m][direction].get(part, {}).get(metric) for m in drawn]
            rows = [(row + offset, cell) for row, cell in enumerate(cells) if _is_measured(cell)]
            values = [cell["value"] for _, cell in rows]
            errors = [
                [max(0, c["value"] - c["ci95"][0]) for _, c in rows],
                [max(0, c["ci95"][1] - c["value"]) for _, c in rows],
            ]
            axes.barh(
                [y for y, _ in rows],
                values,
                0.38,
                xerr=errors,
                color=fill,
                edgecolor="black",
                hatch=hatch,
                linewidth=0.7,
                error_kw={"linewidth": 0.8, "capsize": 2},
                label=part,
            )
        stars = {
            m: " *" * methods[m]["instruction_in_query"]
            + " †" * methods[m].get("sees_labels", False)
            for m in drawn
        }
        axes.set_yticks(range(len(drawn)), [m.replace("_", " ") + stars[m] for m in drawn])
        axes.invert_yaxis()
        axes.set_title(f"{name}: {metric.replace('_', ' ')}", loc="left", fontsize=10)
        axes.set_xlim(0, 1)
    all_axes[0, 0].legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0
    )
    all_axes[-1, 0].xaxis.set_major_formatter(PercentFormatter(1))
    all_axes[-1, 0].set_xlabel(
        "accuracy (%), mean over tasks with 95 % interval\n"
        "* instruction in every query, † sees the task's labels"
    )
    return figure


def _is_measured(cell: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    return cell is not None and cell["value"] is not None


def _curve(
    axes: Axes,
    xs: Sequence[float],
    cells: Sequence[Mapping[str, Any] | None],
    index: int,
    label: str,
) -> None:
    points = [(x, cell) for x, cell in zip(xs, cells, strict=True) if _is_measured(cell)]
    if not points:
        return
    values = [cell["value"] for _, cell in points]
    errors = [
        [max(0, c["value"] - c["ci95"][0]) for _, c in points],
        [max(0, c["ci95"][1] - c["value"]) for _, c in points],
    ]
    axes.errorbar(
        [x for x, _ in points],
        values,
        errors,
        linestyle=_LINES[index % len(_LINES)],
        marker=_MARKERS[index % len(_MARKERS)],
        color=_GREYS[index % len(_GREYS)],
        label=label,
        capsize=2,
        linewidth=1,
        markersize=5,
    )


def _as_accuracy(axes: Axes, label: str) -> None:
    axes.set(ylabel=label, ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _report(run: Path) -> dict[str, Any]:
    path = run / "evaluation" / "report.json"
    return read_json_object(_there(path, f"run ship-ds evaluate --run {run}"))


def _there(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise NotDrawn(f"{path}: not there; {remedy}")
    return path


def risk_coverage(runs: Sequence[Path]) -> Figure:
    """Errors among the answers that are kept when those with least agreement are left out."""
    path = runs[0] / "evaluation" / "tasks.jsonl"
    rows = read_json_lines(_there(path, "`ship-ds evaluate` writes it"))
    rows = [row for row in rows if "agreement" in row]
    if not rows:
        raise NotDrawn(f"{runs[0]}: not measured; `ship-ds evaluate --methods ship_confidence`")
    figure, axes = plt.subplots(figsize=(5.5, 4))
    for index, part in enumerate(dict.fromkeys(row["part"] for row in rows)):
        pairs = sorted(
            (
                (agreed, right)
                for row in rows
                if row["part"] == part
                for agreed, right in zip(row["agreement"], row["exact_match"], strict=True)
            ),
            reverse=True,
        )
        coverage, risk = _risks(pairs)
        axes.step(coverage, risk, where="post", color="black", linestyle=_LINES[index], label=part)
    axes.set(
        xlabel="answers kept (%)", ylabel="errors among them (%)", xlim=(0, 100), ylim=(0, 100)
    )
    axes.legend(frameon=False)
    return figure


def _risks(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Shares of answers kept, and of errors among these, in percent. Answers with the same
    agreement are kept or left out together.

    Args:
        pairs: agreement and whether the answer is right, most agreement first.
    """
    coverage, risk, wrong = [], [], 0.0
    for kept, (agreed, right) in enumerate(pairs, 1):
        wrong += 1 - right
        if kept == len(pairs) or pairs[kept][0] != agreed:
            coverage.append(100 * kept / len(pairs))
            risk.append(100 * wrong / kept)
    return coverage, risk


FIGURES: dict[str, Callable[[Sequence[Path]], Figure]] = {
    "losses": losses,
    "latents": latents,
    "categories": categories,
    "comparison": comparison,
    "shown_examples": shown_examples,
    "training_rules": training_rules,
    "reconstruction_weight": reconstruction_weight,
    "risk_coverage": risk_coverage,
}


OF_LATENTS = ("latents", "categories")
"""Those of `<run>/evaluation/latents.json`, which takes minutes to make."""


def plot(
    runs: Sequence[Path], out: Path, log: Log, names: Sequence[str] = tuple(FIGURES)
) -> list[Path]:
    """Write OUT/NAME.png of every figure that the runs have the data for; the paths written.

    Args:
        runs: the first one is what figures of a single run are of.
        out: folder, made where it is not there.
        log: told what the figures that were not drawn lack.
        names: of `FIGURES`.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        try:
            written.append(save(name, FIGURES[name], runs, out))
        except NotDrawn as error:
            log(f"{name}: not drawn: {error}")
    return written


def save(
    name: str, draw: Callable[[Sequence[Path]], Figure], runs: Sequence[Path], out: Path
) -> Path:
    """Draw one figure into OUT/NAME.png and return its path.

    Args:
        name: of the file, without its ending.
        draw: makes the figure of the runs.
        runs: the first one is what figures of a single run are of.
        out: folder, made where it is not there.

    Raises:
        NotDrawn: what the figure needs is not there.
    """
    path = out / f"{name}.png"
    figure = draw(runs)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
