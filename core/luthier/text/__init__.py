"""Messages and text, to token ids and back."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.text.bounds import bounded as bounded
    from luthier.text.codec import Codec as Codec, Prompt as Prompt
    from luthier.text.json_values import parse_json as parse_json
    from luthier.text.messages import (
        Message as Message,
        is_empty as is_empty,
        read_messages as read_messages,
        role_of as role_of,
        says_nothing as says_nothing,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
