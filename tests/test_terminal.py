"""Streams and dialogues in real processes: Ctrl-C, pipes, a full disk, a terminal."""

import signal
import subprocess
from pathlib import Path

import pytest
import tiny
from commands import COMMAND, ENVIRONMENT, PATIENCE, Typist, process


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that would answer for minutes."""
    text = {"max_position_embeddings": 50_000, "num_hidden_layers": 8}
    return tiny.make_tiny(tmp_path_factory.mktemp("endless"), text=text)


def test_a_piped_dialogue_prints_only_answers(tiny_of, tmp_path):
    folder, vlm, picture = tiny_of("next-mistral").folder, tiny_of("next-mistral").vlm, str(tmp_path / "cat.png")
    tiny.picture(20, 30).save(picture)
    shown = [f"/image '{picture}'", "/image nope.png", "what is it"]
    lines = ["hi", "", *shown, "/help", "/frob", "/reset", "hi", "/quit"]
    options = ["--model", folder, "--dtype", "float32", "--max-new-tokens", "6"]
    done = process("chat", *options, stdin="\n".join([*lines, "not asked"]))
    chat, answers = vlm.chat(), []
    answers.append(chat.say("hi", max_new_tokens=6))
    answers.append(chat.say("what is it", [picture], max_new_tokens=6))
    chat.reset()
    answers.append(chat.say("hi", max_new_tokens=6))
    assert done.stdout == "".join(f"{answer.text}\n" for answer in answers)
    told = [line for line in done.stderr.splitlines() if "loading" not in line]
    assert told[0] == f"picture 1 of the next question: {picture}, 30 x 20 pixels"
    assert told[1] == "picture nope.png: no such file"
    assert told[2].startswith("/image PATH ") and told[-2].startswith("/frob: not a command, expected /image PATH")
    assert told[-1] == "a new dialogue"
    assert done.returncode == 2  # nobody may have seen that two lines were refused


def test_ctrl_c_ends_a_stream_cleanly(endless):
    command = [*COMMAND, "generate", "hi", "--model", str(endless)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as started:
        begun = started.stdout.read(8)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == 130
    assert (begun + out).endswith(b"\n") and b"Traceback" not in err and b"KeyboardInterrupt" not in err


def test_ctrl_c_in_a_typed_dialogue_ends_only_the_answer(endless):
    typist = Typist("chat", "--model", str(endless))
    typist.wait("/help lists the commands.*\n.*> ")
    typist.type("hi\n")
    typist.wait("hi\r\n.")  # the answer's first character
    typist.type("\x03")
    typist.wait(r"\(stopped\)\r\n.*> ")
    typist.type("half")
    typist.wait("half")
    # Between a letter and the wait for the next, Python's own line editing notices a Ctrl-C only with that next key.
    typist.wait(r"\(Ctrl-D leaves\)\r\n.*> ", insist="\x03")
    typist.type("/reset\n")
    typist.wait(r"a new dialogue\r\n.*> ")
    typist.type("\x04")
    assert typist.end() == 0 and "Traceback" not in typist.shown


def test_a_reader_who_leaves_is_no_error(endless):
    command = [*COMMAND, "generate", "hi", "--model", str(endless)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as started:
        started.stdout.read(1)
        started.stdout.close()
        err = started.stderr.read()
        assert (started.wait(PATIENCE), err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("arguments", [["generate", "hi", "--max-new-tokens", "2", "--json"], ["--help"]])
def test_a_full_disk_is_one_line(tiny_of, arguments):
    model = ["--model", str(tiny_of("next-mistral").folder)] if arguments[0] == "generate" else []
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments, *model], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (2, b"minivlm: [Errno 28] No space left on device\n")
