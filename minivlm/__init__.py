"""minivlm: a vision-language model written out by hand, equal to the published LLaVA-NeXT checkpoints."""

from minivlm.answer import Reply, Token
from minivlm.chat import Chat
from minivlm.errors import InputError, NumericError
from minivlm.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["Chat", "InputError", "NumericError", "Pipeline", "Reply", "Token", "load"]
