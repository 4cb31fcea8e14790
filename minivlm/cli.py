"""The command line, `minivlm`: runs a command and prints; the work is done elsewhere (arguments.py has the options).

Answers go to stdout, everything else to stderr. Exit status: 0; 1 for a failed check; 2 for bad usage or bad input,
with one line that says what; 130 after Ctrl-C; 141 when the reader of stdout has gone.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from time import perf_counter
from typing import Any, TextIO

import torch
from safetensors import SafetensorError

import minivlm
from minivlm import hub, parity
from minivlm.answer import Options, Reply, Settings
from minivlm.arguments import BAD_INPUT, parser
from minivlm.bench import run as bench
from minivlm.bench.report import plot
from minivlm.errors import InputError, NumericError
from minivlm.evaluate import heldout
from minivlm.models import SAMPLE_PICTURE, SAMPLE_QUESTION, SHIPPED
from minivlm.ops.cpu_groups import without_kernels
from minivlm.ops.cpu_threads import use_one_thread_if_small
from minivlm.ops.joined import kept_bits
from minivlm.pipeline import Pipeline, choose_device
from minivlm.processor.images import load_image
from minivlm.processor.prompts import question_to_messages
from minivlm.quantisation import STORED
from minivlm.shards import one_line
from minivlm.terminal import dialogue, say, show, utf8
from minivlm.train import recipe
from minivlm.train.run import standing, train

FAILED, INTERRUPTED, NO_READER = 1, 130, 141
SERVING = "serving"  # the part of `minivlm bench` that starts servers
# What has a line to show and no need of a traceback.
TOLD = (InputError, NumericError, OSError, SafetensorError, torch.OutOfMemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    sys.stdin, sys.stdout, sys.stderr = _opened(sys.stdin, "r"), _opened(sys.stdout, "w"), _opened(sys.stderr, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # of a character that the terminal lacks, show the number
    try:
        try:
            status = _run(argv)
        except SystemExit as ended:  # --help, --version and bad usage
            status = ended.code
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_unwritable()
        return NO_READER
    except TOLD as error:
        say(f"minivlm: {one_line(error)}")
        _drop_unwritable()
        return BAD_INPUT


def _opened(stream: TextIO | None, mode: str) -> TextIO:
    """The stream; nothing to read and nowhere to write if it was closed before Python began."""
    return open(os.devnull, mode) if stream is None else stream


def _drop_unwritable() -> None:
    """If stdout cannot take what it still holds (pipe closed, disk full), let it go: exiting would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if arguments.command is None:
        top.error(f"expected a command: {', '.join(COMMANDS)}")
    if rest and rest[0].startswith("-"):
        arguments.error(f"unknown option {rest[0]}")
    if rest:
        arguments.error(f"unexpected argument {rest[0]!r}; a text of several words needs quotes")
    return COMMANDS[arguments.command](arguments)


# Commands: each takes the parsed arguments and returns the exit status.


def _generate(arguments: argparse.Namespace) -> int:
    settings, system = _settings(arguments), arguments.system
    if arguments.top_logprobs and not arguments.json:
        raise InputError("--top-logprobs: alternatives are part of --json, expected both")
    if arguments.raw and (arguments.question is None or system is not None):
        raise InputError("--raw: expected the whole prompt as the question, and no --system")
    question, paths = _question(arguments.question), arguments.image
    if arguments.question is None and not paths:
        paths = [str(hub.resolve(None) / SAMPLE_PICTURE)]
    if arguments.question is None:
        for line in (*(f"picture   {path}" for path in paths), f"question  {question}"):
            say(line)
    pictures = [load_image(path) for path in paths]
    vlm, seconds = _load(arguments)
    use_one_thread_if_small(vlm.model)
    prompt: Any = question
    if not arguments.raw:
        instructions = [] if system is None else [{"role": "system", "content": utf8(system, "--system")}]
        prompt = [*instructions, *question_to_messages(question, len(pictures))]
    inputs = vlm.inputs(prompt, pictures, arguments.raw)
    seed = Options.of(settings).sampling.seeded().seed
    if seed is not None:
        settings["seed"] = seed
    if arguments.json:
        reply = vlm.generate(inputs, **settings)
        asked = {"model": arguments.model or SHIPPED, "question": question, "images": paths}
        print(json.dumps(_plain(reply) | asked | _computed(vlm) | {"load_seconds": seconds}, ensure_ascii=False))
        return 0
    tokens, first, rest = show(vlm.stream(inputs, **settings))
    _summarise(vlm, len(pictures), Reply(tuple(tokens), len(inputs.ids), seed, first, rest), arguments.max_new_tokens)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    pictures = [load_image(path) for path in arguments.image]
    vlm, _ = _load(arguments)
    use_one_thread_if_small(vlm.model)
    if sys.stdin.isatty():
        say(f"{arguments.model or SHIPPED}, {_where(vlm)}. /image PATH shows a picture, /help lists the commands.")
    return dialogue(vlm.chat(arguments.system), pictures, settings)


def _serve(arguments: argparse.Namespace) -> int:
    with _extra_serve("serve"):
        from minivlm.serve.limits import Limits
        from minivlm.serve.run import Serving, serve
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    limits = Limits(**{field.name: given[field.name] for field in fields(Limits) if field.name in given})
    named = {field.name: given[field.name] for field in fields(Serving) if field.name in given}
    serving = Serving(name=arguments.model or SHIPPED, **named)
    key = serving.key()
    with serving.bind() as bound:  # before the model is loaded: a port that is taken should be told at once
        vlm, seconds = _load(arguments)
        say(f"{serving.name} loaded in {seconds:.1f} s: {_where(vlm)}")
        return serve(vlm, serving, limits, key, bound)


def _parity(arguments: argparse.Namespace) -> int:
    report = parity.run(
        arguments.model,
        arguments.image,
        _question(arguments.question),
        arguments.dtype,
        arguments.backend,
        arguments.tokens,
        arguments.tolerance,
        arguments.device,
        arguments.raw,
    )
    print(json.dumps(report.to_json()) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else FAILED


def _train(arguments: argparse.Namespace) -> int:
    for name, value in (("--workers", arguments.workers), ("--save-seconds", arguments.save_seconds)):
        if not value >= 0:
            raise InputError(f"{name}: found {value}, expected at least 0")
    device = choose_device(arguments.device)
    stages = recipe.SMALL_STAGES if arguments.small else recipe.STAGES
    progress = standing(arguments.out, stages)
    if progress is not None:
        finished = (progress.stage, progress.step) == (stages[-1].name, stages[-1].steps)
        where = f"after step {progress.step} of stage {progress.stage}"
        say(f"{arguments.out}: {'is finished' if finished else 'continues ' + where}")
    try:
        folder = train(arguments.out, stages, str(device), arguments.workers, arguments.save_seconds)
    except KeyboardInterrupt:
        say("stopped; the same command continues after the last saved step")
        raise
    print(folder)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    every = "all" in arguments.renderer
    renderers = [name for name in heldout.RENDERERS if every or name in arguments.renderer]
    required = {kind for kind, _ in heldout.REQUIRED}
    if arguments.require and (heldout.SCENE not in renderers or not required & set(arguments.kinds)):
        raise InputError("--require: nothing required is measured with these --kinds and --renderer")
    vlm, _ = _load(arguments)
    answers = {
        name: heldout.evaluate(vlm, arguments.kinds, arguments.count, name, arguments.seed, arguments.batch)
        for name in renderers
    }
    report = heldout.Report(arguments.model or SHIPPED, arguments.seed, answers)
    if arguments.json:
        print(json.dumps(report.to_json() | _computed(vlm), ensure_ascii=False))
    else:
        print("\n".join(report.lines()))
    return FAILED if arguments.require and not report.ok else 0


def _bench(arguments: argparse.Namespace) -> int:
    if SERVING in arguments.rows:
        return _bench_serving(arguments)
    if arguments.clients:
        raise InputError(f"--clients: only of bench {SERVING}")
    if any(number < 1 for number in arguments.threads):
        raise InputError(f"--threads: found {min(arguments.threads)}, expected at least 1")
    if arguments.plot is not None and arguments.rows and not {"context", "batch", "growth"} & set(arguments.rows):
        raise InputError("--plot: draws the rows context, batch and growth, expected one of them")
    report = bench.run(
        arguments.rows,
        choose_device(arguments.device),
        arguments.backend,
        arguments.quick,
        arguments.threads,
        told=lambda row: say(f"{row.name}: {row.setting}"),
    )
    print(json.dumps(report.to_json()) if arguments.json else "\n".join(report.lines()))
    if arguments.plot is not None:
        plot(report.rows, arguments.plot)
    return 0


def _bench_serving(arguments: argparse.Namespace) -> int:
    if arguments.rows != [SERVING] or arguments.threads or arguments.plot is not None:
        raise InputError(f"bench {SERVING}: expected alone, without other rows, --threads and --plot")
    with _extra_serve(f"bench {SERVING}"):
        from minivlm.serve import load
    report = load.run(None, arguments.device, arguments.backend, arguments.clients, arguments.quick, say)
    print(json.dumps(report.to_json(), ensure_ascii=False) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else FAILED


def _soak(arguments: argparse.Namespace) -> int:
    with _extra_serve("soak"):
        from minivlm.serve import soak
    named = (arguments.model, arguments.device, arguments.dtype, arguments.backend)
    report = soak.run(*named, arguments.minutes, arguments.clients, arguments.seed, say)
    print(json.dumps(report.to_json(), ensure_ascii=False) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else FAILED


COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "parity": _parity,
    "train": _train,
    "bench": _bench,
    "soak": _soak,
    "eval": _eval,
}


# What commands share.


@contextmanager
def _extra_serve(command: str) -> Iterator[None]:
    """Around imports of minivlm.serve: tells of a package of the extra `serve` that is missing."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("minivlm"):
            raise
        raise InputError(f"{command}: {missing.name} is not installed, expected pip install 'minivlm[serve]'") from None


def _load(arguments: argparse.Namespace) -> tuple[Pipeline, float]:
    """The model that the arguments name, and the seconds it took."""
    began = perf_counter()
    named = (arguments.model, arguments.device, arguments.dtype, arguments.backend, arguments.prompt_format)
    vlm = minivlm.load(*named, weights=arguments.weights)
    seconds = perf_counter() - began
    if vlm.info.change is not None:
        say(vlm.info.change.line())
    return vlm, seconds


def _settings(arguments: argparse.Namespace) -> Settings:
    """The settings given, checked: a bad one should not wait for a model to be loaded."""
    names = Settings.__annotations__
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    Options.of(given)
    return given


def _question(text: str | None) -> str:
    """The text to ask; "-" is read from stdin, without its last line break."""
    if text is None:
        return SAMPLE_QUESTION
    if text == "-":
        sys.stdin.reconfigure(errors="surrogateescape")  # `utf8` tells of bytes that are no text
        text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise InputError("question: is empty")
    return utf8(text, "question")


def _computed(vlm: Pipeline) -> dict[str, Any]:
    weight = vlm.model.language_model.embed_tokens.weight
    dtype, backend = str(weight.dtype).removeprefix("torch."), vlm.model.language_model.backend.name
    change = vlm.info.change
    form = {"weights": STORED} if change is None else {"weights": change.form, "logit_change": asdict(change)}
    reason = without_kernels(vlm.model.language_model, weight.dtype)
    slower = {} if reason is None else {"without_kernels": reason}
    bits = kept_bits(vlm.model.language_model)
    kept = {} if bits is None else {"bits": round(bits, 1)}
    return {"dtype": dtype, **kept, "device": str(weight.device), "backend": backend, **slower, **form}


def _where(vlm: Pipeline) -> str:
    computed = _computed(vlm)
    form = "" if computed["weights"] == STORED else " and {weights}"
    stored = 8 * vlm.model.language_model.embed_tokens.weight.itemsize
    if not form and computed.get("bits", stored) < stored:
        form = " in {bits} bits"
    slower = "" if "without_kernels" not in computed else " without kernels for single rows ({without_kernels})"
    return f"{{dtype}}{form} on {{device}} by {{backend}}{slower}".format(**computed)


def _plain(reply: Reply) -> dict[str, Any]:
    """A reply for json.dumps. Of its tokens only the last has a reason to finish, so it is told once."""
    values = asdict(reply)
    for token in values["tokens"]:
        del token["finish_reason"]
    return {"text": reply.text, "finish_reason": reply.finish_reason} | values


def _summarise(vlm: Pipeline, pictures: int, reply: Reply, limit: int | None) -> None:
    """One line on stderr: sizes, times, how it was computed, and what a reader may want to know of the end."""
    later = len(reply.tokens) - 1
    speed = f", {later / reply.decode_seconds:.0f} a second" if later and reply.decode_seconds else ""
    tokens = f"{len(reply.tokens)} token{'s' if later else ''}{speed}"
    seen = "without a picture" if not pictures else f"with {pictures} picture{'s' if pictures > 1 else ''}"
    prompt = f"prompt of {reply.prompt_tokens} tokens {seen} in {reply.prefill_seconds:.2f} s"
    parts = [prompt, tokens, _where(vlm)]
    if reply.seed is not None:
        parts.append(f"seed {reply.seed}")
    if reply.finish_reason == "length":
        parts.append("cut off, the context is full" if len(reply.tokens) != limit else "cut off by --max-new-tokens")
    say("; ".join(parts))


if __name__ == "__main__":
    sys.exit(main())
