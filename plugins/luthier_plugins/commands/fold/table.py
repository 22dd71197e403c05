"""What folding cost, as a table on the terminal."""

from rich.table import Table

from luthier_plugins.commands.fold.report import REPORT, FoldReport
from luthier_toolkits.terminal import SafeConsole, counted, shown

COLUMNS = {
    "update": "update of weight",
    "rounding_of_update": "rounding of update",
    "rounding_of_weight": "rounding of weight",
    "quantisation": "quantisation of base",
}


def show_fold(report: FoldReport) -> None:
    """Print the layers that rounding changes most, the mean of all, and where the model is."""
    console = SafeConsole()
    count = len(report.layers)
    rest = f", {report.dequantised} more dequantised" if report.dequantised else ""
    console.print(f"{counted(count, 'layer')} folded into the {report.base} weights, in {report.dtype}{rest}")
    keys = [key for key in COLUMNS if report.mean[key] is not None]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", no_wrap=True)
    for key in keys:
        table.add_column(COLUMNS[key], justify="right")
    for layer in report.worst():
        table.add_row(shown(layer.name), *(_percent(getattr(layer, key)) for key in keys))
    table.add_row(f"mean of {count}", *(_percent(report.mean[key]) for key in keys), style="bold")
    console.print(table)
    console.print(f"model: {shown(report.out)} · every layer: {shown(report.out / REPORT)}", soft_wrap=True)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
