"""The terminal: answers on stdout as they come, everything else on stderr, and the dialogue of `minivlm chat`.

With lines piped in instead of typed, stdout holds the answers and nothing else. It knows nothing of options.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from time import perf_counter

from minivlm.answer import Settings, Token
from minivlm.chat import Chat
from minivlm.errors import InputError
from minivlm.processor.images import ImageSource, load_image

HELP = (
    "/image PATH   show a picture (a file or a URL) with the next question; may be given several times",
    "/reset        begin a new dialogue",
    "/help         this list",
    "/quit         leave, as Ctrl-D does; Ctrl-C stops an answer",
)


def say(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def utf8(text: str, name: str) -> str:
    """The text itself. Python hands over bytes that are not UTF-8 as lone surrogates, which no tokenizer reads."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{name}: holds bytes that are not UTF-8 text")
    return text


def show(tokens: Iterable[Token]) -> tuple[list[Token], float, float]:
    """Print the tokens' texts as they come and a line break at the end, however it ends.

    Returns the tokens, the seconds to the first and the seconds from there to the last.
    """
    began, shown, times = perf_counter(), [], []
    try:
        for token in tokens:
            times.append(perf_counter())
            shown.append(token)
            print(token.text, end="", flush=True)
    finally:
        if shown:
            print(flush=True)
    return shown, times[0] - began, times[-1] - times[0]


def dialogue(chat: Chat, images: Sequence[ImageSource], settings: Settings) -> int:
    """Answer line after line until the input ends; `images` go with the first question.

    A line that cannot be done is told on stderr and the dialogue goes on as if it had not come. Returns the exit
    status: 2 if that happened to a line that was not typed, where nobody may have seen it.
    """
    sys.stdin.reconfigure(errors="surrogateescape")  # `utf8` tells of bytes that are no text
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (gives `input` line editing and a history)
    pending, refused = list(images), False
    while (line := _read_line(typed)) is not None:
        try:
            if line == "/quit":
                break
            elif line.startswith("/"):
                _command(line, chat, pending)
            elif line:
                _ask(chat, utf8(line, "question"), pending, settings)
        except InputError as error:
            refused = True
            say(str(error))
            if pending and not line.startswith("/"):
                say(f"({len(pending)} shown for the next question; /reset forgets the dialogue and them)")
        except KeyboardInterrupt:  # while answering
            if not typed:
                raise
            say("(stopped)")
    return 2 if refused and not typed else 0


def _read_line(typed: bool) -> str | None:
    """The next line, stripped, or None at the end of the input. Ctrl-C discards a line half typed."""
    while True:
        try:
            if typed and sys.stdout.isatty():
                return input("> ").strip()
            if typed:
                print("> ", end="", file=sys.stderr, flush=True)
            return input().strip()
        except EOFError:
            if typed:
                say("")
            return None
        except KeyboardInterrupt:
            if not typed:
                raise
            say("\n(Ctrl-D leaves)")


def _command(line: str, chat: Chat, pending: list[ImageSource]) -> None:
    """Carry out a line that begins with a slash."""
    name, _, rest = line.partition(" ")
    if name == "/image":
        path = os.path.expanduser(rest.strip().strip("'\""))  # a file dropped on a terminal comes in quotes
        if not path:
            raise InputError("/image: found no path, expected /image PATH")
        picture = load_image(utf8(path, "/image"))
        pending.append(picture)
        say(f"picture {len(pending)} of the next question: {path}, {picture.width} x {picture.height} pixels")
    elif name == "/reset" and not rest:
        chat.reset()
        pending.clear()
        say("a new dialogue")
    elif name == "/help" and not rest:
        for help_line in HELP:
            say(help_line)
    else:
        raise InputError(f"{line}: not a command, expected /image PATH, /reset, /help or /quit")


def _ask(chat: Chat, question: str, pending: list[ImageSource], settings: Settings) -> None:
    """Print the answer; `pending` is emptied once the pictures are part of the dialogue."""
    turns = len(chat.messages)
    stream = chat.stream(question, pending, **settings)
    try:
        show(stream)
    finally:
        stream.close()
        if len(chat.messages) > turns:
            pending.clear()
