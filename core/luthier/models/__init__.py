"""From the name of a model to a model.

Sources, tokenizer, chat templates, score heads.
"""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.models.model import (
        LoadedModel as LoadedModel,
        load_model as load_model,
        load_model_tokenizer as load_model_tokenizer,
    )
    from luthier.models.model_source import Source as Source, find_source as find_source
    from luthier.models.pretrained import (
        MOST as MOST,
        from_pretrained as from_pretrained,
        load_config as load_config,
        load_whole as load_whole,
        quiet as quiet,
        told as told,
    )
    from luthier.models.saved_adapters import adapter_readers as adapter_readers, peft_kind as peft_kind
    from luthier.models.score_head import (
        NAME as NAME,
        TASKS as TASKS,
        ScoreHead as ScoreHead,
        as_classifier as as_classifier,
        attach_head as attach_head,
        class_of as class_of,
        head_name as head_name,
        head_of as head_of,
        load_head as load_head,
        saved_kind as saved_kind,
        without_value as without_value,
    )
    from luthier.models.tokenizer import (
        answer_ends as answer_ends,
        load_tokenizer as load_tokenizer,
        verify_tokenizer as verify_tokenizer,
    )
    from luthier.models.vocabulary import grow as grow
else:
    __getattr__, __dir__, __all__ = attach(__name__)
