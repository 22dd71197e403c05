"""Composing a run from overrides, building its methods, refusing what nothing reads."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.config.building import build as build, build_method as build_method, selected as selected
    from luthier.config.composition import (
        compose as compose,
        in_one_line as in_one_line,
        opened as opened,
        prepare as prepare,
        session as session,
    )
    from luthier.config.hydra_errors import PRIMARY as PRIMARY, check_overrides as check_overrides
    from luthier.config.model_config import ModelConfig as ModelConfig, ModelPlace as ModelPlace
    from luthier.config.renamed import renamed_options as renamed_options
    from luthier.config.typed_options import quoted as quoted
    from luthier.config.validation import validate as validate
else:
    __getattr__, __dir__, __all__ = attach(__name__)
