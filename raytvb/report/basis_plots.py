"""Draws errors and stored bytes: what a basis loses, and how much space it saves."""

from __future__ import annotations

from collections.abc import Sequence

from raytvb.report.numbers import chosen_names, decoded_bases
from raytvb.report.plot_style import add_legend, new_figure, short, svg, whole_numbers
from raytvb.report.summary_contracts import Disentanglement, Summary
from raytvb.storage.gram_rows import Arrival


def plot_error(summary: Summary) -> str:
    """Relative reconstruction error over M, one line for each method, as SVG."""
    figure = new_figure()
    axes = figure.subplots()
    for method, entries in decoded_bases(summary).items():
        sizes = [entry.size for entry in entries]
        errors = [entry.relative_error for entry in entries]
        axes.plot(sizes, errors, "o-", label=method)
    axes.set(xlabel="basis size M", ylabel="relative squared error", ylim=(0, None))
    whole_numbers(axes)
    add_legend(axes)
    return svg(figure)


def plot_stream(history: Sequence[Arrival]) -> str:
    """Least relative error that any M basis vectors can have, after each arrival, as SVG."""
    figure = new_figure()
    axes = figure.subplots()
    floors: dict[int, list[tuple[int, float]]] = {}
    for point in history:
        for size, floor in point.floor.items():
            floors.setdefault(size, []).append((point.vectors, floor))
    for size in sorted(floors):
        vectors, floor_of_size = zip(*floors[size], strict=True)
        axes.plot(vectors, floor_of_size, "o-", label=f"M = {size}")
    axes.set(xlabel="vectors arrived", ylabel="relative squared error", ylim=(0, None))
    whole_numbers(axes)
    if floors:
        axes.legend()
    return svg(figure)


def plot_disentanglement(pair: Disentanglement, highest: float) -> str:
    """Heat maps of one pair's errors, side by side, with colours from 0 to `highest`, as SVG."""
    columns = len(pair.models)
    figure = new_figure(width=3.4 * columns + 1.0, height=3.4)
    row = figure.subplots(1, columns, squeeze=False)[0]
    first, second = map(short, pair.tasks)
    for axes, (name, errors) in zip(row, pair.models.items(), strict=True):
        mesh = axes.pcolormesh(
            pair.coefficients,
            pair.coefficients,
            list(zip(*errors.error, strict=True)),  # puts the first task on the x axis
            shading="nearest",
            vmin=0.0,
            vmax=highest,
            edgecolors="face",
        )
        axes.set_title(f"{name}: mean {errors.mean:.2f}", fontsize="medium")
        axes.set(aspect="equal", xlabel=f"coefficient of {first}")
        if len(pair.coefficients) < 8:
            axes.set_xticks(pair.coefficients)
            axes.set_yticks(pair.coefficients)
    row[0].set_ylabel(f"coefficient of {second}")
    figure.colorbar(mesh, ax=list(row), label="error")
    return svg(figure)


def plot_storage(summary: Summary) -> str:
    """Bars of megabytes, as SVG.

    Shows dense float32 vectors, the stored vectors, the masks, and the chosen basis.
    """
    figure = new_figure(height=2.2)
    axes, stored = figure.subplots(), summary.stored_bytes
    bars = {
        "dense fp32 vectors": stored.dense_fp32,
        "stored vectors": stored.vectors,
        "masks": stored.masks,
    }
    for name in chosen_names(summary):
        bars[f"basis {name}"] = summary.addition[name].stored_bytes
    downwards = list(reversed(bars.items()))  # the first bar is drawn at the bottom
    labels, sizes = zip(*downwards, strict=True)
    axes.barh(labels, [size / 1e6 for size in sizes])
    axes.set_xlabel("MB")
    return svg(figure)
