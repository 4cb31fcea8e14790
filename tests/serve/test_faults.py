"""What clients are told when an answer breaks, before it begins and in the middle: by a server that is damaged so."""

import io
import sys
from pathlib import Path

import damaged
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, IncompleteGenerationError
from PIL import Image
from serving import DATA_URI, Server, data_uri

HOT = {"temperature": 1e6}  # long answers
INTERNAL = "internal error, see the server's log"
# (seed, status, error_type, how the message begins, traces in the log)
FAULTS = [
    (damaged.NAN, 424, "generation", "Request failed during generation: ", 0),
    (damaged.GUIDE, 500, "incomplete_generation", "Incomplete generation: ", 0),
    (damaged.MODEL, 500, "internal", INTERNAL, 1),
    (damaged.WIRE, 500, "internal", INTERNAL, 1),
]


@pytest.fixture(scope="module")
def server():
    server = Server(command=[sys.executable, str(Path(damaged.__file__))])
    yield server
    server.client.close()
    server.stop()


@pytest.fixture
def traces(server):
    """traces() is how many exceptions the log has told since the test began."""
    before = len(server.lines)

    def told() -> int:
        since = len(server.lines)
        server.client.get("/nowhere")
        server.log_of("/nowhere", 404, since)
        return sum("Traceback" in line for line in server.lines[before:])

    return told


def asked(seed: int) -> dict:
    regex = {"type": "regex", "value": "[0-9]{40}"}
    return {"inputs": "a", "parameters": {"max_new_tokens": 45, "seed": seed, "grammar": regex, **HOT}}


def chatted(seed: int, **more) -> dict:
    messages = [{"role": "user", "content": "a"}]
    form = {"response_format": asked(seed)["parameters"]["grammar"]}
    return {"messages": messages, "max_tokens": 45, "seed": seed, **HOT, **form, **more}


@pytest.mark.parametrize("seed, status, kind, message, count", FAULTS)
def test_an_answer_that_breaks_is_a_status(server, traces, seed, status, kind, message, count):
    answer = server.post("/generate", asked(seed))
    assert answer.status_code == status and answer.json()["error_type"] == kind
    assert answer.json()["error"].startswith(message)
    answer = server.post("/v1/chat/completions", chatted(seed))
    assert answer.status_code == status and answer.json()["error"]["message"].startswith(message)
    assert traces() == 2 * count


@pytest.mark.parametrize("seed, status, kind, message, count", FAULTS)
def test_a_stream_that_breaks_ends_with_an_error_event(server, traces, seed, status, kind, message, count):
    *events, error = server.events("/generate_stream", asked(seed))
    assert [event["index"] for event in events] == [1, 2, 3]
    assert error["error"].startswith(message) and error["error_type"] == kind
    for path, body in (("/v1/chat/completions", chatted(seed, stream=True)),
                       ("/v1/chat/completions", chatted(seed, stream=True, n=2) | {"seed": seed - 1}),
                       ("/v1/completions", {"prompt": "a", **chatted(seed, stream=True)})):  # fmt: skip
        *_, error, done = server.events(path, body)
        assert done == "[DONE]" and error["error"]["http_status_code"] == status
        assert error["error"]["message"].startswith(message) and error["error_type"] == kind
    assert traces() == 4 * count
    assert server.metric(f'tgi_request_failure{{err="{kind}"}}') >= 4


def test_the_clients_raise_it(server):
    hub = InferenceClient(base_url=server.url)
    for seed, expected in ((damaged.NAN, GenerationError), (damaged.GUIDE, IncompleteGenerationError)):
        for stream in (False, True):
            with pytest.raises(expected):
                list(hub.text_generation("a", **asked(seed)["parameters"], stream=stream))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    for seed, _, _, message, _ in FAULTS:
        with pytest.raises(openai.APIError, match=message):
            arguments = chatted(seed)
            list(client.chat.completions.create(model="m", **arguments, stream=True))


def test_a_picture_that_is_not_a_number_is_424(server):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    black = {"inputs": f"![]({data_uri(file.getvalue())})What?", "parameters": {}}
    answer = server.post("/generate", black)
    assert answer.status_code == 424 and answer.json()["error_type"] == "generation"
    (event,) = server.events("/generate_stream", black)
    assert event == answer.json()


def test_a_model_that_fails_at_the_start_is_told(server):
    (line,) = (line for line in server.lines if "not warmed: " in line)
    assert "expected a finite number" in line


def test_others_are_not_harmed(server, vlm):
    known = vlm.generate("[INST] Is it red? [/INST]", raw=True).text
    streams = [server.client.stream("POST", "/generate_stream", json=asked(fault[0])) for fault in FAULTS]
    open_ = [stream.__enter__() for stream in streams]
    body = {"inputs": "[INST] Is it red? [/INST]", "parameters": {}}
    assert server.post("/generate", body).json()["generated_text"] == known
    for response, stream in zip(open_, streams, strict=True):
        assert "error" in response.read().decode()
        stream.__exit__(None, None, None)
    assert server.post("/generate", {"inputs": f"![]({DATA_URI})Hi", "parameters": {}}).is_success
    assert server.client.get("/health").is_success
    assert server.metric("tgi_batch_current_size") == 0
