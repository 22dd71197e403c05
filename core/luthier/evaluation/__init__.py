"""Held-out quality: losses and answers."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import evaluator_of as evaluator_of
    from luthier.evaluation.evaluation import (
        Evaluator as Evaluator,
        greedy as greedy,
        plain_text as plain_text,
    )
    from luthier.evaluation.options import (
        EvaluationConfig as EvaluationConfig,
        ReferenceConfig as ReferenceConfig,
    )
    from luthier.evaluation.reference_pass import (
        check_reference as check_reference,
        measured_in_training as measured_in_training,
        reference_options as reference_options,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
