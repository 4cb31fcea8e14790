"""The arguments of the command line: names, types, defaults, and the help that `--help` prints.

It runs nothing. What a value may be is for those who use it to say; here it has only its type.
"""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from minivlm import __version__, parity
from minivlm.bench import run as bench
from minivlm.evaluate import heldout
from minivlm.models import SHIPPED
from minivlm.ops import backend as backends
from minivlm.ops.quantised import FORMATS
from minivlm.processor.prompts import TEMPLATES
from minivlm.quantisation import STORED
from minivlm.train.questions import KINDS

BAD_INPUT = 2  # exit status


class _Parser(argparse.ArgumentParser):
    """An argument parser that tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Wide(argparse.HelpFormatter):
    """Help with room for the longest option in the left column."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)


def parser() -> _Parser:
    """The parser of `minivlm`. What it returns has the command's name, or None, and `error` to end with a line."""
    top = _Parser("minivlm", description="Ask a vision-language model about pictures.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"minivlm {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, add, usage, text in (
        ("generate", _generate, "[QUESTION] [options]", "answer one question; without one, about a sample picture"),
        ("chat", _chat, "[options]", "a dialogue in the terminal, with pictures"),
        ("serve", _serve, "[options]", "serve it over HTTP to the clients of TGI, OpenAI and Hugging Face"),
        ("parity", _parity, "[QUESTION] [options]", "compare a checkpoint stage by stage with transformers"),
        ("train", _train, "--out FOLDER [options]", f"train {SHIPPED} from nothing, or continue a run that stopped"),
        ("bench", _bench, "[ROW ...] [options]", "how fast it runs here, beside the physical limit and transformers"),
        ("soak", _soak, "[options]", "minutes of clients good and bad against a running server, every answer checked"),
        ("eval", _eval, "[options]", f"ask {SHIPPED} held-out questions and print the table of scores"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            usage=f"%(prog)s {usage}",
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
            formatter_class=_Wide,
        )
        command.set_defaults(error=command.error)
        add(command)
    return top


def _generate(parser: _Parser) -> None:
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="the question; - reads it from stdin")
    _image_option(parser)
    parser.add_argument("--raw", action="store_true", help="QUESTION is the prompt itself, <image> for each picture")
    _json_option(parser)
    _answer_options(parser)
    parser.add_argument("--top-logprobs", type=int, metavar="N", help="with --json: the N likeliest of every token")
    _load_options(parser)


def _chat(parser: _Parser) -> None:
    _image_option(parser)
    _answer_options(parser)
    _load_options(parser)


def _serve(parser: _Parser) -> None:
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone)"
    )
    group.add_argument("--port", type=int, default=8080, metavar="N", help="port, 0 for a free one (default 8080)")
    group.add_argument("--api-key", metavar="KEY", help="what clients must send as Authorization: Bearer KEY")
    group.add_argument("--api-key-file", metavar="FILE", help="the same from a file, hidden from who lists processes")
    group.add_argument("--cors-allow-origin", action="append", metavar="ORIGIN",
                       help="whose pages may ask; repeatable (default: any)")  # fmt: skip
    group.add_argument("--shutdown-seconds", type=float, metavar="S", help="for answers to finish when it is stopped "
                       "(default 30)")  # fmt: skip
    group.add_argument("--json-logs", action="store_true", help="each line on stderr is a JSON object")
    group = parser.add_argument_group("pictures")
    group.add_argument("--no-remote-images", dest="remote_images", action="store_false", help="fetch none")
    group.add_argument("--allow-private-hosts", action="store_true",
                       help="fetch also from this machine and its network")  # fmt: skip
    group.add_argument("--max-images", type=int, metavar="N", help="of a request (default 8)")
    group.add_argument("--max-image-bytes", type=int, metavar="N", help="of a picture's file (default 10,000,000)")
    group.add_argument("--max-image-pixels", type=int, metavar="N", help="of a picture (default 50,000,000)")
    group.add_argument("--fetch-seconds", type=float, metavar="S", help="to fetch a picture (default 20)")
    group = parser.add_argument_group("limits, named as in text-generation-inference where it has them")
    group.add_argument("--payload-limit", type=int, metavar="N", help="bytes of a body (default 20,000,000)")
    group.add_argument("--body-seconds", type=float, metavar="S", help="for headers and for a body (default 30)")
    group.add_argument("--send-seconds", type=float, metavar="S", help="for a client to take a part (default 60)")
    group.add_argument("--max-concurrent-requests", type=int, metavar="N", help="beyond them 429 (default 128)")
    group.add_argument("--max-input-tokens", type=int, metavar="N", help="of a prompt (default: the model's context)")
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="prompt and answer (default: the same)")
    group.add_argument("--max-best-of", type=int, metavar="N", help="answers to one prompt (default 2)")
    group.add_argument("--max-stop-sequences", type=int, metavar="N", help="(default 4)")
    group.add_argument("--max-top-n-tokens", type=int, metavar="N", help="alternatives of a token (default 5)")
    group.add_argument("--max-client-batch-size", type=int, metavar="N", help="prompts of a completion (default 4)")
    group.add_argument("--validation-workers", type=int, metavar="N", help="threads for pictures and text (default 2)")
    group = parser.add_argument_group("the engine")
    group.add_argument("--max-batch", type=int, metavar="N", help="answers computed together (default 32)")
    group.add_argument("--cache-bytes", type=int, metavar="N", help="for keys and values (default 1 GiB)")
    group.add_argument("--picture-bytes", type=int, metavar="N", help="for encoded pictures (default 256 MiB)")
    group.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt positions of a step (default 512)")
    _load_options(parser)


def _parity(parser: _Parser) -> None:
    parser.add_argument("question", nargs="?", metavar="QUESTION", default=parity.QUESTION, help="what to ask")
    parser.add_argument("--image", metavar="PATH_OR_URL", help="the picture (default: one that is drawn)")
    parser.add_argument("--raw", action="store_true", help="QUESTION is the prompt itself, <image> for the picture")
    parser.add_argument("--tokens", type=int, default=20, metavar="N", help="greedy tokens to compare (default 20)")
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest relative difference (default: none for "
                        "backend reference on a CPU, else twice that of transformers' own attentions)")  # fmt: skip
    _json_option(parser)
    _model_options(parser, device="cpu", backend="reference")


def _train(parser: _Parser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the run; FOLDER/checkpoint at last")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), metavar="N",
                        help="processes that draw pictures (default: all cores but one)")  # fmt: skip
    parser.add_argument("--save-seconds", type=float, default=60, metavar="S", help="save every S seconds (default 60)")
    parser.add_argument("--small", action="store_true", help="a few steps of every stage, to see it run")


def _eval(parser: _Parser) -> None:
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--count", type=int, default=heldout.COUNT, metavar="N",
                        help=f"questions of each kind (default {heldout.COUNT})")  # fmt: skip
    renderers = [*heldout.RENDERERS, "all"]
    parser.add_argument("--renderer", nargs="+", choices=renderers, default=[heldout.SCENE], metavar="NAME",
                        help=f"who draws the pictures: {', '.join(renderers)} (default {heldout.SCENE})")  # fmt: skip
    parser.add_argument("--require", action="store_true", help="exit with 1 if a required score is not reached")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other pictures and questions (default 0)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="questions at a time (default 16)")
    _json_option(parser)
    _load_options(parser)


def _bench(parser: _Parser) -> None:
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(bench.NAMES)} (default: all there are); "
                        "or alone serving: many clients at once, beside transformers serve")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer rounds and the smaller decoder alone")
    parser.add_argument("--threads", type=int, nargs="+", default=[], metavar="N",
                        help="numbers of threads on a CPU (default: 1 and all)")  # fmt: skip
    parser.add_argument("--clients", type=int, nargs="+", default=[], metavar="N",
                        help="serving: numbers of clients (default 1 8 32 128)")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens a second against context and batch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--backend", default="auto", help=f"auto, {' or '.join(backends.NAMES)} (default auto)")
    _json_option(parser)


def _soak(parser: _Parser) -> None:
    parser.add_argument("--minutes", type=float, default=10, metavar="M", help="how long (default 10)")
    parser.add_argument("--clients", type=int, default=24, metavar="N", help="at once, half of them good (default 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other questions and moments (default 0)")
    _json_option(parser)
    _model_options(parser)


def _image_option(parser: _Parser) -> None:
    parser.add_argument("--image", action="append", default=[], metavar="PATH_OR_URL", help="a picture; repeatable")


def _json_option(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _answer_options(parser: _Parser) -> None:
    """The fields of Options and Sampling; without any the answer is greedy."""
    group = parser.add_argument_group("the answer, greedy unless an option for sampling is given")
    group.add_argument("--system", metavar="TEXT", help="instructions before the dialogue")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="end after N tokens")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; repeatable")
    group.add_argument("--temperature", type=float, metavar="T", help="sampling: divides the scores")
    group.add_argument("--top-k", type=int, metavar="K", help="sampling: keep the K best tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sampling: keep the best that have probability P")
    group.add_argument("--min-p", type=float, metavar="P", help="sampling: keep what has P times the best's")
    group.add_argument("--seed", type=int, metavar="N", help="sampling: the same seed draws the same answer")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")


def _model_options(parser: _Parser, device: str = "auto", backend: str = "auto") -> argparse._ArgumentGroup:
    """What says which model runs, and how."""
    group = parser.add_argument_group("the model")
    group.add_argument("--model", metavar="MODEL", help=f"a folder or a hub id (default: {SHIPPED}, which is shipped)")
    group.add_argument("--device", default=device, help=f"auto, cpu, cuda, cuda:N or mps (default {device})")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    group.add_argument("--backend", default=backend, help=f"auto, {' or '.join(backends.NAMES)} (default {backend})")
    return group


def _load_options(parser: _Parser) -> None:
    """The arguments of minivlm.load."""
    formats = ", ".join(TEMPLATES)
    group = _model_options(parser)
    group.add_argument("--weights", default=STORED, metavar="FORM",
                       help=f"{STORED}, or quantise the decoder's while loading: {' or '.join(FORMATS)}")  # fmt: skip
    group.add_argument("--prompt-format", metavar="NAME", help=f"if the folder has no chat template: {formats}")
