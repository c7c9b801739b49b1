"""Loss and acceptance against tokens learnt."""

from __future__ import annotations

from pathlib import Path

from ascend_plugin.mtp.train import Course


def plot(course: Course, title: str, path: Path) -> None:
    """Draw a training as .png or .svg.

    Args:
        course: with at least one validation.
        title: above the drawing.
        path: of the file; ``check_plot_path`` has accepted it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [point.tokens / 1e6 for point in course.points]
    left.plot(tokens, [point.loss for point in course.points], color="tab:gray")
    left.set(xlabel="million tokens learnt from", ylabel="cross entropy", ylim=(0, None))
    for i, name in enumerate(("first", "second", "third")):
        values = [100 * point.acceptance[i] for point in course.points]
        right.plot(tokens, values, label=f"{name} draft")
    right.set(xlabel="million tokens learnt from", ylabel="held-out drafts accepted (%)")
    right.set_ylim(0, 100)
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
