"""Tables of what is installed."""

from __future__ import annotations

from luthier.registry import catalogue, commands, plugins, unmet_core_requirement
from luthier_toolkits.terminal import plain_console, plain_table, shown


def show_metadata() -> int:
    """Print every plugin from entry-point metadata; nothing of a plugin is imported."""
    table = plain_table("kind", "method", "from", "module")
    wrong = []
    for plugin in plugins():
        table.add_row(*map(shown, (plugin.kind or "·", plugin.method, plugin.provider, plugin.entry.value)))
        if reason := unmet_core_requirement(plugin.requires):
            wrong.append(f"{plugin.entry.name}: {plugin.provider} {reason}")
    console = plain_console()
    console.print(table)
    for line in wrong:
        console.print(f"[red]{shown(line)}[/]", highlight=False)
    return 1 if wrong else 0


def show_loaded() -> int:
    """Import every plugin and print what it registered, or why it is broken."""
    registries = (catalogue(), commands())
    table = plain_table("kind", "method", "from", "what it is")
    for method in (method for registry in registries for method in registry.all()):
        table.add_row(
            method.kind,
            shown(method.name),
            shown(method.plugin.provider),
            shown((method.cls.__doc__ or "").strip().split("\n")[0]),
        )
    console = plain_console()
    console.print(table)
    broken = {name: reason for registry in registries for name, reason in registry.broken.items()}
    for name, reason in broken.items():
        console.print(f"[red]broken[/] {shown(name)}: {shown(reason)}", highlight=False)
    return 1 if broken else 0
