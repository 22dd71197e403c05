"""The command `plugins`, which takes plain arguments."""

from luthier.contracts import Command

COMMAND = Command("luthier_plugins.commands.plugins.arguments:run", composed=False)
