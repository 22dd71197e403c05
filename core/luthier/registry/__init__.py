"""Finding, loading and checking plugins.

Entry points, catalogue, schema, presets, which methods go together.
"""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.registry.command_catalogue import (
        command as command,
        command_names as command_names,
        commands as commands,
        composed_commands as composed_commands,
    )
    from luthier.registry.compatibility import (
        check_combination as check_combination,
        check_processes as check_processes,
        device_refusal as device_refusal,
        refusal as refusal,
    )
    from luthier.registry.discovery import (
        CORE as CORE,
        plugins as plugins,
        unmet_core_requirement as unmet_core_requirement,
    )
    from luthier.registry.method_catalogue import (
        Catalogue as Catalogue,
        Registered as Registered,
        catalogue as catalogue,
        require as require,
    )
    from luthier.registry.preset_files import presets as presets
    from luthier.registry.schema import build as build, node as node
else:
    __getattr__, __dir__, __all__ = attach(__name__)
