"""A dialogue of several turns that keeps its key-value cache: a turn prefills only what is new.

An answer stays the ids that were generated; only what the chat template puts behind it (its end, the next
question, the words that make the model answer) is tokenised. It knows nothing of any particular template.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Unpack

from minivlm.answer import Options, Reply, Settings, Token
from minivlm.errors import InputError
from minivlm.generate import collect, generate, new_cache
from minivlm.ops.kv_cache import KVCache
from minivlm.processor import Inputs, Processor, check_images
from minivlm.processor.images import ImageSource
from minivlm.processor.prompts import Message, question_to_messages
from minivlm.row import Row, Vocabulary
from minivlm.vlm import VLM


class Chat:
    """One dialogue; `messages` is its text so far. Get one from `Pipeline.chat`.

    A turn that raises InputError (say, one beyond the context) leaves the dialogue as it was. A stream that
    is dropped or interrupted keeps what was generated as the answer; before its first token, the turn did not
    happen. Pictures may come with any turn. What the model reads again is what it generated, stop strings
    included; `messages` has what was shown.
    """

    def __init__(self, model: VLM, processor: Processor, vocabulary: Vocabulary, system: str | None = None):
        self.model, self.processor, self.vocabulary = model, processor, vocabulary
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._open: Generator[Token, None, None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every turn, not the system text, and release the cache."""
        self._close()
        self.messages: list[Message] = list(self._system)
        self._cache: KVCache | None = None
        self._past: list[int] = []  # ids that the cache holds
        self._pending: list[int] = []  # ids generated behind them that it does not hold yet

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the dialogue so far; the last answer is not closed before the next question."""
        return (*self._past, *self._pending)

    def say(self, text: str, images: Sequence[ImageSource] = (), **settings: Unpack[Settings]) -> Reply:
        """The whole answer to a question with its new pictures."""
        row, question = self._turn(text, images, Options.of(settings))
        return collect([row], ((0, token) for token in self._answer(row, question)))[0]

    def stream(
        self, text: str, images: Sequence[ImageSource] = (), **settings: Unpack[Settings]
    ) -> Generator[Token, None, None]:
        """The answer's tokens as they are generated. The next turn ends a stream that is still open."""
        row, question = self._turn(text, images, Options.of(settings))
        self._open = self._answer(row, question)
        return self._open

    def _turn(self, text: str, images: Sequence[ImageSource], options: Options) -> tuple[Row, Message]:
        self._close()
        check_images(images)
        (question,) = question_to_messages(text, len(images))
        if self._past:
            inputs = self._continuation(question, images)
        else:
            inputs = self.processor.chat([*self.messages, question], images)
        context = self.model.config.text.max_position_embeddings
        return Row(inputs, options, self.vocabulary, context, self._past), question

    def _continuation(self, question: Message, images: Sequence[ImageSource]) -> Inputs:
        """What follows the cached ids: what is pending of the answer, its end, and the new question.

        Mistral: behind the cached "[INST] Hi [/INST] Hello" stands "</s> [INST] Why? [/INST]". An end-of-text
        id that the model generated is never pending, so it is not there twice.
        """
        asked, whole = self.messages[:-1], [*self.messages, question]
        if not self.processor.render(whole).startswith(self.processor.render(asked)):
            raise InputError("chat template: it rewrites earlier turns, so this dialogue cannot be continued")
        inputs = self.processor.chat_continuation(whole, images)
        return dataclasses.replace(inputs, ids=(*self._pending, *inputs.ids))

    def _answer(self, row: Row, question: Message) -> Generator[Token, None, None]:
        if self._cache is None:
            self._cache = new_cache(self.model, [row])
        text: list[str] = []
        try:
            for _, token in generate(self.model, [row], self._cache):
                text.append(token.text)
                yield token
        finally:
            if text:
                self.messages += [question, {"role": "assistant", "content": "".join(text)}]
                # An interrupt may come between an id and its text; such an id was never shown.
                given = row.ids[: row.prompt_tokens + len(text)]
                self._past, pending = given[: row.cached], given[row.cached :]
                self._pending = [token_id for token_id in pending if token_id not in self.vocabulary.eos_ids]

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
