"""The command `sample`: answers to prompts, scored and chosen among."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.commands.sample.report import SampleResult as SampleResult
    from luthier_plugins.commands.sample.sampling import sample as sample
else:
    __getattr__, __dir__, __all__ = attach(__name__)
