"""Legends fit into their figures."""

from matplotlib.figure import Figure

from mllm_protector.reporting.drawing import WIDTH, add_legend, short_label
from mllm_protector.reporting.tables import in_words


def test_a_legend_of_all_arms_stays_inside_its_figure() -> None:
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    for arm in ("none", "refusal", "protector", "llama_guard", "safety_prompt"):
        axes.barh([0], [1], label=short_label(in_words(arm), 60))
    add_legend(figure, axes, "A title")
    figure.draw_without_rendering()
    [legend] = figure.legends
    inside, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= inside.x0 < inside.x1 <= whole.x1
