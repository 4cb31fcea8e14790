"""huggingface_hub's InferenceClient, current, as its documents show it; every request goes where it sends it."""

import json
import math
from dataclasses import asdict

import jsonschema
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError
from serving import DATA_URI, SAMPLE

PROMPT = f"![]({DATA_URI})What is written?"
SCHEMA = {"properties": {"colour": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
          "required": ["colour", "n"]}  # fmt: skip


@pytest.fixture(scope="module")
def client(server):
    return InferenceClient(base_url=server.url)


@pytest.fixture(scope="module")
def known(vlm):
    return vlm.generate("<image>What is written?", [SAMPLE], raw=True)


def test_text_generation(client, server, known):
    assert client.text_generation(prompt=PROMPT, max_new_tokens=16) == known.text
    assert InferenceClient(f"{server.url}/generate").text_generation(PROMPT) == known.text


def test_text_generation_streams(client, server, known):
    told = list(client.text_generation(prompt=PROMPT, max_new_tokens=16, stream=True))
    assert "".join(told[:-1]) == known.text and told[-1] == "</s>"
    events = client.text_generation(prompt=PROMPT, max_new_tokens=16, stream=True, details=True)
    assert "".join(event.token.text for event in events if not event.token.special) == known.text


def test_details(client, known):
    answer = client.text_generation(PROMPT, max_new_tokens=16, details=True, top_n_tokens=2, decoder_input_details=True)
    assert answer.generated_text == known.text and answer.details.finish_reason == "eos_token"
    assert [token.id for token in answer.details.tokens] == [token.id for token in known.tokens]
    assert len(answer.details.prefill) == known.prompt_tokens and answer.details.seed is None
    sampled = client.text_generation(PROMPT, max_new_tokens=4, details=True, do_sample=True, seed=42, temperature=0.5,
                                     best_of=None, stop=["Z"], truncate=1000, return_full_text=False)  # fmt: skip
    assert sampled.details.seed == 42
    *_, last = client.text_generation(PROMPT, max_new_tokens=4, details=True, stream=True)
    assert last.details.input_length == known.prompt_tokens and asdict(last.details)["generated_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_grammar(client, stream):
    """The documents' schema has no "type"."""
    grammar = {"type": "json", "value": SCHEMA}
    answer = client.text_generation("a", max_new_tokens=60, seed=42, do_sample=True, temperature=3.0, grammar=grammar,
                                    stream=stream, details=True)  # fmt: skip
    text = "".join(event.token.text for event in answer if not event.token.special) if stream else answer.generated_text
    value = json.loads(text)
    assert isinstance(value, dict)
    jsonschema.validate(value, SCHEMA)


def test_errors_are_the_clients_own(client):
    with pytest.raises(ValidationError, match="top_p"):
        client.text_generation("a", top_p=1.0)
    with pytest.raises(ValidationError, match="max_new_tokens"):
        list(client.text_generation("a", max_new_tokens=5000, stream=True))
    with pytest.raises(HfHubHTTPError, match="`top_p` must be"):
        client.chat_completion([{"role": "user", "content": "Hi"}], top_p=2.0)


def test_chat_completion(client, vlm):
    picture = {"type": "image_url", "image_url": {"url": DATA_URI}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "Describe the picture."}]}]
    known = vlm.generate("Describe the picture.", [SAMPLE]).text
    answer = client.chat_completion(messages, max_tokens=100, temperature=0, logprobs=True, top_logprobs=2, seed=42)
    assert answer.choices[0].message.content == known
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    options = {"include_usage": True}
    *told, last = client.chat_completion(messages, temperature=0, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content for chunk in told) == known
    assert last.usage.completion_tokens == answer.usage.completion_tokens
    assert client.chat.completions.create(messages, temperature=0).choices[0].message.content == known


def test_response_format(client):
    messages = [{"role": "user", "content": "Hi"}]
    for form in ({"type": "json", "value": SCHEMA},
                 {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}):  # fmt: skip
        answer = client.chat_completion(messages, response_format=form, max_tokens=60, temperature=3.0)
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_health_and_info(server):
    client = InferenceClient(server.url, provider="hf-inference")
    assert client.health_check() is True
    assert client.get_endpoint_info()["model_id"] == "minivlm-tiny"


def test_a_token(strict):
    client = InferenceClient(base_url=strict.url, token="secret-1")
    assert client.text_generation("a", max_new_tokens=1) is not None


def test_image_to_text(client, vlm, web):
    """The file's bytes without a content type, a path with one, an address that the client fetches itself."""
    known = vlm.generate("Describe the picture.", [SAMPLE]).text
    for picture in (SAMPLE.read_bytes(), SAMPLE, str(SAMPLE), f"{web.url}/sample.png"):
        assert client.image_to_text(picture).generated_text == known


@pytest.mark.parametrize("question", ["What is shown?", "Is there a red circle?"])
def test_questions_about_a_picture(client, vlm, question):
    known = vlm.generate(question, [SAMPLE])
    likely = math.exp(sum(token.logprob for token in known.tokens))
    (visual,) = client.visual_question_answering(SAMPLE, question)
    (document,) = client.document_question_answering(SAMPLE.read_bytes(), question, lang="en")
    for answer in (visual, document):
        assert answer.answer == known.text and answer.score == pytest.approx(likely, abs=0.05)
    assert document.start is None and document.end is None


def test_picture_tasks_without_a_picture(client, server, strict):
    with pytest.raises(HfHubHTTPError, match="not a picture"):
        client.image_to_text(b"hello")
    with pytest.raises(HfHubHTTPError, match="not a picture"):
        client.visual_question_answering(b"hello", "What?")
    assert "null" in server.post("/", {"inputs": "aGk=", "question": None}).text
    assert "type: inputs.Pictured.question: " in server.post("/", {"inputs": {"image": "aGk="}}).text
    assert "not base64" in server.post("/", {"inputs": {"image": "@", "question": "What?"}}).text
    for body in (b'{"inputs": "a"}', b""):
        assert server.client.post("/", content=body).status_code == 415
    big = strict.client.post("/", content=bytes(70_000), headers={"Authorization": "Bearer secret-1"})
    assert big.status_code == 422 and "70000 bytes, expected at most 60000" in big.text
    assert strict.client.post("/", content=SAMPLE.read_bytes()).status_code == 401
