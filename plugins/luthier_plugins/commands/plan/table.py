"""A plan on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from luthier_toolkits.terminal import SafeConsole, shown

if TYPE_CHECKING:
    from luthier_plugins.commands.plan.memory import Memory
    from luthier_plugins.commands.plan.planning import PlanResult
    from luthier_plugins.commands.plan.ranking import Choice
    from luthier_plugins.commands.plan.reference import ReferencePlan

ROWS = {
    "weights": "base weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimiser": "optimiser states",
    "held": "other models",
    "activations": "activations",
    "workspace": "workspace",
    "retained": "allocator's allowance",
    "baseline": "process",
}
SHOWN = 12
"""Combinations that are shown; all of them are in the result."""


def show(plan: PlanResult, console: Console | None = None) -> None:
    """Print `plan`."""
    console = console or SafeConsole()
    chosen = " ".join(f"{kind}={name}" for kind, name in plan.methods.items())
    share = f"{plan.trained:,} trained ({100 * plan.trained / plan.parameters:.2f} %)"
    size = f"{plan.parameters:,} parameters, {share} · {plan.dtype} on {plan.device}"
    console.print(f"[bold]model    [/] {shown(plan.model)} · {size}", soft_wrap=True)
    console.print(f"[bold]methods  [/] {shown(chosen)}", soft_wrap=True)
    console.print(_memory(plan))
    console.print(f"[bold]fits     [/] {_verdict(plan)}", soft_wrap=True)
    if plan.reference:
        console.print(f"[bold]reference[/] {_reference(plan, plan.reference)}", soft_wrap=True)
    console.print(f"[bold]time     [/] {_time(plan)}\n", soft_wrap=True)
    console.print(_choices(plan))


def _memory(plan: PlanResult) -> Table:
    with_it, without = (plan.memory, plan.otherwise)[:: 1 if plan.checkpointing else -1]
    stored, computed = ("", " ←") if plan.checkpointing else (" ←", "")
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(f"GB at {plan.pack_tokens:,} tokens a pack")
    table.add_column(f"activations kept{stored}", justify="right")
    table.add_column(f"gradient checkpointing{computed}", justify="right")
    for field, label in ROWS.items():
        values: list[float] = [getattr(memory, field) for memory in (without, with_it)]
        if any(values):
            table.add_row(label, *map(gigabytes, values))
    table.add_section()
    table.add_row("sum", *(_sum(memory, plan.capacity) for memory in (without, with_it)), style="bold")
    return table


def _sum(memory: Memory, capacity: float | None) -> str:
    colour = "" if capacity is None else "green" if memory.total <= capacity else "red"
    return f"[{colour}]{gigabytes(memory.total)}[/]" if colour else gigabytes(memory.total)


def _verdict(plan: PlanResult) -> str:
    if plan.capacity is None:
        return f"not known: {shown(plan.advice)}"
    sign = "[green]yes[/]" if plan.fits else "[red]no[/]"
    return f"{sign}, {gigabytes(plan.total)} of {gigabytes(plan.capacity)} GB: {shown(plan.advice)}"


def _reference(plan: PlanResult, reference: ReferencePlan) -> str:
    text = f"measured once before training: {gigabytes(reference.memory)} GB"
    if plan.tflops is None:
        return f"{text}, {reference.flops_per_token / 1e9:,.2f} GFLOP a token"
    return f"{text}, {duration(plan.tokens * reference.flops_per_token / (plan.tflops * 1e12))}"


def _time(plan: PlanResult) -> str:
    work = f"{plan.flops_per_token / 1e9:,.2f} GFLOP a token"
    if plan.tflops is None or plan.seconds is None:
        return f"{work}; tflops=SPEED of the device says how long {plan.tokens:,.0f} tokens take"
    rate = plan.tokens / plan.seconds
    speed = f"{rate:,.3g} tokens/s at {plan.tflops:.3g} TFLOP/s"
    return f"{work}, {speed}: {duration(plan.seconds)} for {plan.tokens:,.0f}"


def _choices(plan: PlanResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("quantiser", "adapter", "optimiser"):
        table.add_column(name)
    for name in ("trained", "GB", "headroom GB"):
        table.add_column(name, justify="right")
    for choice in plan.choices[:SHOWN]:
        table.add_row(*_row(choice))
    if left := len(plan.choices) - SHOWN:
        table.caption = f"and {left} more: json=FILE has all" if left > 0 else None
    return table


def _row(choice: Choice) -> list[str]:
    left = "–" if choice.headroom is None else gigabytes(choice.headroom)
    colour = "red" if choice.headroom is not None and choice.headroom < 0 else ""
    names = map(shown, [choice.quantiser or "–", choice.adapter, choice.optimiser])
    return [
        *names,
        f"{choice.trained:,}",
        gigabytes(choice.total),
        f"[{colour}]{left}[/]" if colour else left,
    ]


def gigabytes(size: float) -> str:
    """Return bytes as GB, 10⁹ of them."""
    return f"{size / 1e9:,.2f}"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
