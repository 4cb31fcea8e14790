"""The command line as a user meets it: what is on stdout, what on stderr, the exit status, never a traceback."""

import io
import json
import re
import sys

import pytest
import tiny
import torch
from commands import process

import minivlm
from minivlm import cli, hub, parity
from minivlm.evaluate import heldout
from minivlm.stages import Difference, Report
from minivlm.train import recipe


@pytest.fixture(scope="module")
def folder(tiny_of):
    return tiny_of("next-mistral").folder


@pytest.fixture
def vlm(tiny_of):
    return tiny_of("next-mistral").vlm


@pytest.fixture
def picture(tmp_path):
    tiny.picture(20, 30).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


@pytest.fixture
def run(capfd):
    """run(*arguments) is (exit status, stdout, stderr) of a command, in this process."""

    def call(*arguments) -> tuple[int, str, str]:
        capfd.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def type_in(monkeypatch):
    """type_in(text) is what a command in this process finds on stdin."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))


def test_an_answer_goes_to_stdout_and_the_rest_to_stderr(folder, vlm, picture):
    arguments = ["--image", picture, "--model", folder, "--dtype", "float32", "--max-new-tokens", "12"]
    done = process("generate", "what is it", *arguments)
    expected = vlm.generate("what is it", [picture], max_new_tokens=12)
    assert (done.returncode, done.stdout) == (0, expected.text + "\n")
    assert f"prompt of {expected.prompt_tokens} tokens with 1 picture" in done.stderr
    assert "by --max-new-tokens" in done.stderr


def test_json_is_one_object_with_everything(run, folder, vlm, picture):
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "max_new_tokens": 5, "top_logprobs": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    asked = ["what is it", "--image", picture, "--model", folder, "--dtype", "float32", "--json", *options]
    status, out, _ = run("generate", *asked)
    found, reply = json.loads(out), vlm.generate("what is it", [picture], **settings)
    assert status == 0 and out.count("\n") == 1
    assert [token["id"] for token in found["tokens"]] == [token.id for token in reply.tokens]
    for token, expected in zip(found["tokens"], reply.tokens, strict=True):
        assert set(token) == {"id", "text", "logprob", "sampled_logprob", "alternatives"}
        assert token["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
        assert [other["id"] for other in token["alternatives"]] == [other.id for other in expected.alternatives]
    assert (found["text"], found["finish_reason"], found["seed"]) == (reply.text, "length", 7)
    assert (found["prompt_tokens"], found["images"]) == (reply.prompt_tokens, [picture])
    assert (found["dtype"], found["device"], found["backend"]) == ("float32", "cpu", "cpu")
    assert (found["model"], found["question"]) == (str(folder), "what is it")
    assert min(found["load_seconds"], found["prefill_seconds"], found["decode_seconds"]) > 0


def test_a_drawn_seed_is_told_and_draws_the_same_again(run, folder):
    asked = ["hi", "--model", folder, "--temperature", "1.5", "--max-new-tokens", "20"]
    status, out, err = run("generate", *asked)
    seed = re.search(r"seed (\d+)", err).group(1)
    assert status == 0 and run("generate", *asked, "--seed", seed)[1] == out


def test_system_stop_and_raw_reach_the_model(run, folder, vlm, picture):
    prompt, common = "[INST] <image>\nhi [/INST]", ["--model", folder, "--dtype", "float32", "--max-new-tokens", "8"]
    first = vlm.generate(prompt, [picture], raw=True, max_new_tokens=8)
    stop = first.text[3:5]
    status, out, _ = run("generate", prompt, "--raw", f"--stop={stop}", "--image", picture, *common)
    assert (status, out) == (0, first.text[: first.text.index(stop)] + "\n")
    messages = [{"role": "system", "content": "red"}, {"role": "user", "content": "hi"}]
    _, out, _ = run("generate", "hi", "--system", "red", *common)
    assert out == vlm.generate(messages, max_new_tokens=8).text + "\n"


def test_no_argument_asks_about_the_sample_picture(run, folder, tmp_path, monkeypatch):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tiny.picture(20, 30).save(tmp_path / cli.SAMPLE_PICTURE)
    monkeypatch.setattr(hub, "_shipped", lambda: tmp_path)
    status, out, err = run("generate")
    expected = minivlm.load(folder).generate(cli.SAMPLE_QUESTION, [tmp_path / cli.SAMPLE_PICTURE])
    assert (status, out) == (0, expected.text + "\n")
    assert str(tmp_path / "sample.png") in err and cli.SAMPLE_QUESTION in err


def test_the_first_commands_answer_is_true(run):
    """The README shows it: what the shipped checkpoint says of the shipped picture."""
    expected = (
        "a red star at the top left, the text FISH at the bottom left, a green square at the bottom, "
        "a blue circle at the top right\n"
    )
    assert run("generate", "--device", "cpu", "--dtype", "float32")[:2] == (0, expected)


def test_a_question_from_stdin_keeps_all_but_its_last_line_break(run, folder, type_in):
    type_in(" two\nlines\n\n")
    _, out, _ = run("generate", "-", "--model", folder, "--max-new-tokens", "1", "--json")
    assert json.loads(out)["question"] == " two\nlines\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected a command: generate, chat, serve, parity, train, bench, soak, eval (see minivlm --help)"),
        (["answer"], "invalid choice: 'answer'"),
        (["generate", "--colour"], "minivlm generate: unknown option --colour (see minivlm generate --help)"),
        (["generate", "--temp", "1"], "unknown option --temp"),  # no abbreviations
        (["generate", "what", "is", "it"], "unexpected argument 'is'; a text of several words needs quotes"),
        (["generate", "hi", "--top-k", "few"], "argument --top-k: invalid int value: 'few'"),
        (["generate", "hi", "--image"], "argument --image: expected one argument"),
        (["eval", "--kinds", "smell"], "argument --kinds: invalid choice: 'smell'"),
        (["train"], "required: --out"),
        (["generate", ""], "question: is empty"),
        (["generate", "hi\udcff"], "question: holds bytes that are not UTF-8 text"),
        (["generate", "--raw"], "--raw: expected the whole prompt"),
        (["generate", "hi", "--top-logprobs", "2"], "--top-logprobs: alternatives are part of --json"),
        (["generate", "hi", "--temperature", "-1"], "temperature: found -1.0, expected 0 (greedy) or a positive"),
        (["generate", "hi", "--temperature", "nan"], "temperature: found nan"),
        (["generate", "hi", "--temperature", "0", "--top-k", "5"], "beside top_k=5, which asks for sampling"),
        (["generate", "hi", "--top-p", "0"], "top_p: found 0.0, expected a number above 0"),
        (["generate", "hi", "--max-new-tokens", "0"], "max_new_tokens: found 0, expected an integer of at least 1"),
        (["chat", "--stop", ""], "stop: found [''], expected a list of strings that are not empty"),
        (["generate", "hi", "--image", "no such.png"], "picture no such.png: no such file"),
        (["generate", "hi", "--image", "."], "picture .: is a folder, expected a file"),
        (["chat", "--image", __file__], "not a picture in a format that is read"),
        (["generate", "hi", "--device", "gpu"], "device: found 'gpu', expected auto, cpu, cuda"),
        (["generate", "hi", "--backend", "fast"], "backend 'fast' is not known, expected auto"),
        (["generate", "hi", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["parity", "--tolerance", "-1"], "tolerance: found -1.0"),
        (["eval", "--require", "--kinds", "describe"], "--require: nothing required is measured"),
        (["train", "--out", "x", "--workers", "-1"], "--workers: found -1, expected at least 0"),
        (["train", "--out", f"{__file__}/x", "--device", "cpu"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("minivlm") and message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "hi", "--dtype", "int8"], "dtype 'int8', expected auto"),
        (["generate", "the cat " * 500], "prompt: found "),
        (["generate", "hi", "--max-new-tokens", "9999"], "max_new_tokens: found 9999 after a prompt of"),
        (["generate", "<image> hi", "--raw"], "1 <image> for 0 pictures, expected one each"),
        (["parity", "--tokens", "0"], "tokens: found 0, expected at least 1"),
        (["eval", "--seed", "-1"], "seed: found -1, expected at least 0"),
        (["eval", "--count", "0"], "count: found 0, expected at least 1"),
    ],
)
def test_bad_input_that_the_model_must_tell(run, folder, arguments, message):
    status, out, err = run(*arguments, "--model", folder)
    last = err.strip().splitlines()[-1]  # a loading bar may come before it
    assert (status, out) == (2, "") and "Traceback" not in err
    assert last.startswith("minivlm: ") and message in last


def test_weights_that_give_no_numbers_are_one_line(run, tmp_path):
    broken = minivlm.load(tiny.make_tiny(tmp_path / "tiny"), device="cpu", dtype="float32", backend="sdpa")
    with torch.no_grad():
        broken.model.language_model.lm_head.weight.fill_(3e38)  # finite, but a sum of 32 products is not
    broken.save(tmp_path / "saved")
    status, out, err = run("generate", "hi", "--model", tmp_path / "saved", "--dtype", "float32")
    assert (status, out) == (2, "") and "expected a finite number" in err.splitlines()[-1]


def test_version(run):
    assert run("--version") == (0, f"minivlm {minivlm.__version__}\n", "")


def test_a_process_without_a_traceback():
    done = process("generate", "hi", "--model", "no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"minivlm: no/such/folder: no such folder.*\n", done.stderr)


def test_a_dialogue_goes_on_after_a_question_beyond_the_context(run, folder, vlm, type_in):
    type_in("the cat " * 500 + "\nhi")
    _, out, err = run("chat", "--model", folder, "--dtype", "float32", "--max-new-tokens", "6")
    assert out == vlm.generate("hi", max_new_tokens=6).text + "\n"
    assert "expected fewer than the model's context of 400" in err


def test_parity_prints_its_report(run, folder):
    status, out, _ = run("parity", "what is it", "--model", folder, "--dtype", "float32", "--tokens", "3")
    assert status == 0 and out.splitlines()[-1].startswith("parity: all ")
    status, out, _ = run("parity", "hi", "--model", folder, "--dtype", "float32", "--tokens", "3", "--json")
    assert status == 0 and json.loads(out)["ok"] is True


def test_parity_that_fails_is_status_1(run, monkeypatch):
    departing = Difference("logits", (1, 2), 0.5, 0.1, 0.0, "departs", "farthest at [0, 1]")
    monkeypatch.setattr(parity, "run", lambda *arguments: Report({"model": "m"}, (departing,)))
    status, out, _ = run("parity")
    assert status == 1 and out.splitlines()[-1] == "parity fails, first at logits: farthest at [0, 1]"


def test_eval_prints_the_table_and_require_asks_for_it(run, folder):
    asked = ["eval", "--model", folder, "--kinds", "shape", "box", "--count", "2"]
    status, out, _ = run(*asked, "--renderer", "scene", "jpeg")
    assert status == 0 and "shape" in out and "jpeg" in out and "FAIL" in out
    status, out, _ = run(*asked, "--require", "--json")
    found = json.loads(out)
    assert status == 1 and found["ok"] is False and len(found["answers"]["scene"]) == 4


def test_eval_require_is_status_0_when_all_is_reached(run, folder, monkeypatch):
    def perfect(vlm, kinds, count, renderer, seed, batch):
        return tuple(heldout.Answer(kind, "", "?", "!", "!", 1.0) for kind in kinds)

    monkeypatch.setattr(heldout, "evaluate", perfect)
    assert run("eval", "--model", folder, "--require", "--kinds", "shape", "text")[0] == 0


def test_train_makes_a_checkpoint_and_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    stages = tuple(stage for stage in recipe.SMALL_STAGES if stage.name in ("decoder", "projector"))
    monkeypatch.setattr(recipe, "SMALL_STAGES", stages)
    asked = ["train", "--out", tmp_path / "run", "--device", "cpu", "--workers", "0", "--small"]
    status, out, _ = run(*asked)
    assert (status, out) == (0, f"{tmp_path / 'run' / 'checkpoint'}\n")
    assert minivlm.load(tmp_path / "run" / "checkpoint", device="cpu").generate("hi", max_new_tokens=2).text is not None
    status, again, err = run(*asked)
    assert (status, again) == (0, out) and "run: is finished" in err


@pytest.mark.parametrize(
    "state, message", [(b"half a fi", "damaged"), (b"\x02" + bytes(7) + b"{}", "not the state of")]
)
def test_a_run_that_cannot_be_resumed_is_one_line(run, tmp_path, state, message):
    (tmp_path / "state.safetensors").write_bytes(state)
    status, out, err = run("train", "--out", tmp_path, "--device", "cpu")
    assert (status, out, err.count("\n")) == (2, "", 1) and f"state.safetensors: {message}" in err


def test_train_says_that_it_can_go_on(run, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    status, _, err = run("train", "--out", tmp_path)
    assert (status, err) == (130, "stopped; the same command continues after the last saved step\n")
