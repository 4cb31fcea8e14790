"""TGI's routes over loopback: fields, defaults, messages, statuses and headers; answers against the pipeline's own."""

import json
import math
import subprocess

import huggingface_hub
import pytest
from serving import DATA_URI, SAMPLE

QUESTION = "[INST] <image>\nDescribe the picture. [/INST]"
INPUTS = QUESTION.replace("<image>", f"![]({DATA_URI})")


@pytest.fixture(scope="module")
def reply(vlm):
    return vlm.generate(QUESTION, [SAMPLE], raw=True)


def test_generate_gives_the_pipelines_answer_and_nothing_else(server, reply):
    since = len(server.lines)
    answer = server.post("/generate", {"inputs": INPUTS, "parameters": {}})
    assert answer.json() == {"generated_text": reply.text}
    for name in ("compute-time", "compute-characters", "total-time", "validation-time", "queue-time", "inference-time",
                 "time-per-token"):  # fmt: skip
        assert float(answer.headers[f"x-{name}"]) >= 0
    assert answer.headers["x-compute-type"] == "cpu"
    assert int(answer.headers["x-prompt-tokens"]) == reply.prompt_tokens
    assert int(answer.headers["x-generated-tokens"]) == len(reply.tokens)
    line = server.log_of("/generate", 200, since)
    assert f"generated_tokens={len(reply.tokens)}" in line and "finish_reason=stop" in line


def test_details_have_every_token_with_its_probability(server, reply):
    parameters = {"details": True, "top_n_tokens": 3, "decoder_input_details": True}
    details = server.post("/generate", {"inputs": INPUTS, "parameters": parameters}).json()["details"]
    assert details["finish_reason"] == "eos_token" and details["seed"] is None
    assert details["generated_tokens"] == len(reply.tokens) == len(details["top_tokens"])
    assert [token["id"] for token in details["tokens"]] == [token.id for token in reply.tokens]
    for token, known in zip(details["tokens"], reply.tokens, strict=True):
        assert token["logprob"] == pytest.approx(known.sampled_logprob, abs=0.05)
    assert details["tokens"][-1]["text"] == "</s>" and details["tokens"][-1]["special"] is True
    assert "".join(token["text"] for token in details["tokens"][:-1]) == reply.text
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) == 3 and top[0]["id"] == token["id"]
        assert [one["logprob"] for one in top] == sorted((one["logprob"] for one in top), reverse=True)


def test_prefill_has_the_prompts_probabilities(server, vlm):
    text = "[INST] What is red? [/INST] a red star"
    parameters = {"decoder_input_details": True, "max_new_tokens": 1}
    prefill = server.post("/generate", {"inputs": text, "parameters": parameters}).json()["details"]["prefill"]
    inputs = vlm.processor(text)
    logprobs = vlm.model([inputs]).float().log_softmax(-1)
    expected = [float(logprobs[i, following]) for i, following in enumerate(inputs.ids[1:])]
    assert [token["id"] for token in prefill] == list(inputs.ids)
    assert prefill[0]["logprob"] is None
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(expected, abs=0.1)


def test_a_stream_has_an_event_a_token_and_no_end_mark(server, reply):
    events = server.events("/generate_stream", {"inputs": INPUTS, "parameters": {"details": True}})
    assert [event["index"] for event in events] == list(range(1, len(reply.tokens) + 1))
    assert [event["token"]["id"] for event in events] == [token.id for token in reply.tokens]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == reply.text
    details = {"finish_reason": "eos_token", "generated_tokens": len(events), "seed": None}
    assert events[-1]["details"] == details | {"input_length": reply.prompt_tokens}
    assert "top_tokens" not in events[0]


def test_curl_reads_a_stream_as_it_is_written(server):
    """The documents' own command: `-N`, and the lines that TGI writes."""
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 3, "top_n_tokens": 1}}
    command = ["curl", "-sN", f"{server.url}/generate_stream", "-X", "POST", "-d", "@-"]
    told = subprocess.run([*command, "-H", "Content-Type: application/json"], input=json.dumps(body),
                          capture_output=True, text=True, timeout=60).stdout  # fmt: skip
    lines = told.split("\n\n")
    assert lines.pop() == "" and len(lines) == 3
    for line in lines:
        assert line.startswith('data:{"index":')
        assert len(json.loads(line[5:])["top_tokens"]) == 1


def test_stream_headers(server):
    with server.client.stream("POST", "/generate_stream", json={"inputs": "a"}) as response:
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-compute-characters"] == "1"
        assert response.headers["x-compute-type"] == "cpu"


def test_the_root_answers_in_a_list_or_streams(server, reply):
    assert server.post("/", {"inputs": INPUTS, "parameters": {}}).json() == [{"generated_text": reply.text}]
    events = server.events("/", {"inputs": INPUTS, "parameters": {}, "stream": True})
    assert events[-1]["generated_text"] == reply.text


def test_a_stop_string_stays_and_is_what_ended_it(server, reply):
    stop = reply.text[6:9]
    parameters = {"stop": ["never", stop], "details": True}
    answer = server.post("/generate", {"inputs": INPUTS, "parameters": parameters}).json()
    expected = reply.text[: reply.text.index(stop) + len(stop)]
    assert answer["generated_text"] == expected
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_return_full_text_puts_the_prompt_first(server):
    text = "[INST] Is it red? [/INST]"
    alone = server.post("/generate", {"inputs": text, "parameters": {}}).json()["generated_text"]
    parameters = {"return_full_text": True}
    assert server.post("/generate", {"inputs": text, "parameters": parameters}).json()["generated_text"] == text + alone
    events = server.events("/generate_stream", {"inputs": text, "parameters": parameters})
    assert events[-1]["generated_text"] == text + alone


def test_sampling_is_asked_for_or_implied_and_follows_its_seed(server):
    def details(**parameters):
        body = {"inputs": INPUTS, "parameters": {"details": True, "max_new_tokens": 8, **parameters}}
        return server.post("/generate", body).json()["details"]

    def ids(found):
        return [token["id"] for token in found["tokens"]]

    assert details(seed=3)["seed"] is None  # greedy: the seed is not used
    assert details(do_sample=True, seed=3)["seed"] == 3
    assert details(top_k=5)["seed"] is not None
    hot = {"temperature": 3.0, "seed": 11}
    assert ids(details(**hot)) == ids(details(**hot))
    assert any(ids(details(temperature=3.0, seed=seed)) != ids(details(**hot)) for seed in (1, 2, 3))
    sampled = details(temperature=0.5, top_k=1)
    assert all(math.isclose(token["logprob"], 0, abs_tol=1e-6) for token in sampled["tokens"])


def test_a_frequency_penalty_is_the_pipelines_own(server, vlm, reply):
    """Greedy, so that the answer is known; the prompt's tokens do not count."""
    known = vlm.generate(QUESTION, [SAMPLE], raw=True, frequency_penalty=2.0, max_new_tokens=30)
    assert known.text != reply.text
    client = huggingface_hub.InferenceClient(base_url=server.url)
    asked = {"frequency_penalty": 2.0, "max_new_tokens": 30, "details": True}
    answer = client.text_generation(INPUTS, **asked)
    assert answer.generated_text == known.text and answer.details.seed is None
    assert [token.id for token in answer.details.tokens] == [token.id for token in known.tokens]
    *_, last = client.text_generation(INPUTS, **asked, stream=True)
    assert last.generated_text == known.text


def test_typical_p_implies_sampling(server):
    client = huggingface_hub.InferenceClient(base_url=server.url)
    asked = {"max_new_tokens": 8, "details": True}
    answer = client.text_generation(INPUTS, **asked, typical_p=0.9)
    assert answer.details.seed is not None
    again = client.text_generation(INPUTS, **asked, typical_p=0.9, seed=answer.details.seed)
    assert again.generated_text == answer.generated_text
    single = client.text_generation(INPUTS, **asked, typical_p=1e-6, temperature=3.0)  # one token is the most typical
    assert all(math.isclose(token.logprob, 0, abs_tol=1e-6) for token in single.details.tokens)
    drawn = {client.text_generation(INPUTS, **asked, typical_p=0.999, temperature=3.0).generated_text for _ in range(4)}
    assert len(drawn) > 1


def test_absent_parameters_mean_sampling(server):
    """As in TGI: without `parameters` ids are drawn, with `{}` the best is taken."""
    assert server.post("/generate", {"inputs": INPUTS}).status_code == 200
    hot = {server.post("/generate", {"inputs": "a"}).json()["generated_text"] for _ in range(6)}
    cold = {server.post("/generate", {"inputs": "a", "parameters": {}}).json()["generated_text"] for _ in range(3)}
    assert len(cold) == 1 and len(hot) > 1


def test_best_of_gives_the_likeliest_first(server):
    parameters = {"best_of": 2, "temperature": 2.0, "details": True, "max_new_tokens": 6}
    answer = server.post("/generate", {"inputs": INPUTS, "parameters": parameters}).json()
    best, (other,) = answer["details"], answer["details"]["best_of_sequences"]

    def mean(found):
        return sum(token["logprob"] for token in found["tokens"]) / len(found["tokens"])

    assert mean(best) >= mean(other) and best["seed"] != other["seed"]
    assert {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"} <= set(other)


def test_truncate_keeps_the_last_tokens(server):
    parameters = {"truncate": 3, "decoder_input_details": True, "max_new_tokens": 1}
    prefill = server.post("/generate", {"inputs": "one two three four", "parameters": parameters}).json()["details"]
    tokens = server.post("/tokenize", {"inputs": "one two three four"}).json()
    assert [token["id"] for token in prefill["prefill"]] == [token["id"] for token in tokens[-3:]]


def test_truncate_never_cuts_through_a_picture(server):
    body = {"inputs": f"![]({DATA_URI}) Hello", "parameters": {"max_new_tokens": 1, "details": True, "truncate": 4}}
    answer = server.post("/generate", body)
    assert answer.status_code == 200 and answer.headers["x-prompt-tokens"] == "4"  # the picture is gone whole
    body["parameters"]["truncate"] = 20
    answer = server.post("/generate", body)
    assert answer.status_code == 422 and "cuts through picture" in answer.json()["error"]


def test_a_picture_is_a_picture_only_with_empty_brackets(server, vlm):
    ids = server.post("/tokenize", {"inputs": f"![]({DATA_URI})What?"}).json()
    image_id = vlm.processor.tokenizer.image_token_id
    expected = vlm.processor("<image>What?", [SAMPLE]).ids
    assert [token["id"] for token in ids] == list(expected)
    assert {token["text"] for token in ids if token["id"] == image_id} == {"<image>"}
    literal = server.post("/tokenize", {"inputs": "![cat](x)"}).json()
    assert len(literal) > 3 and literal[-1]["stop"] == len("![cat](x)")
    assert all("![cat](x)"[token["start"] : token["stop"]] == token["text"] for token in literal)


def test_sagemaker_and_vertex(server):
    text = "[INST] Is it red? [/INST]"
    alone = server.post("/generate", {"inputs": text, "parameters": {}}).json()
    assert server.post("/invocations", {"inputs": text, "parameters": {}}).json() == [alone]
    chat = {"messages": [{"role": "user", "content": "Is it red?"}], "temperature": 0}
    assert server.post("/invocations", chat).json()["choices"][0]["message"]["content"] == alone["generated_text"]
    completion = {"prompt": text, "temperature": 0}
    assert server.post("/invocations", completion).json()["choices"][0]["text"] == alone["generated_text"]
    instances = {"instances": [{"inputs": text, "parameters": {}}] * 2}
    assert server.post("/vertex", instances).json() == {"predictions": [alone["generated_text"]] * 2}
    answer = server.post("/vertex", {"instances": instances["instances"] * 3})
    assert answer.status_code == 422 and answer.json()["error_type"] == "batch size exceeded"


def test_info_health_and_the_list_of_models(server):
    info = server.client.get("/info").json()
    defaults = {"max_concurrent_requests": 128, "max_best_of": 2, "max_stop_sequences": 4, "max_client_batch_size": 4,
                "validation_workers": 2, "max_total_tokens": 2048, "max_input_tokens": 2047}  # fmt: skip
    assert info | defaults == info and info["model_id"] == "minivlm-tiny"
    assert info["model_pipeline_tag"] == "image-text-to-text"
    for path in ("/health", "/ping", "/"):
        answer = server.client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    page = server.client.get("/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html") and "<html" in page.text
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model == {"id": "minivlm-tiny", "object": "model", "created": 0, "owned_by": "minivlm"}
    assert server.client.get("/docs").status_code == 200
    assert "/generate_stream" in server.client.get("/api-doc/openapi.json").json()["paths"]


COUNTERS = ("request_count", "request_success", "batch_inference_count", "batch_inference_success")
GAUGES = ("queue_size", "batch_current_size", "batch_current_max_tokens", "batch_total_tokens")
HISTOGRAMS = (
    *("request_duration", "request_validation_duration", "request_queue_duration", "request_inference_duration"),
    *("request_mean_time_per_token_duration", "request_input_length", "request_max_new_tokens"),
    *("request_generated_tokens", "request_skipped_tokens", "batch_next_size", "batch_inference_duration"),
    *("batch_forward_duration", "batch_decode_duration"),
)


def test_metrics_have_tgis_names(server):
    server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}})
    server.post("/generate", {"inputs": ""})
    text = server.client.get("/metrics").text
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES), ("histogram", HISTOGRAMS)):
        assert [name for name in names if f"# TYPE tgi_{name} {kind}\n" not in text] == []
    assert 'tgi_request_failure{err="validation"}' in text
    assert server.metric("tgi_request_count") >= 1 and server.metric("tgi_request_generated_tokens_count") >= 1
    server.until(lambda: server.metric("tgi_batch_current_size") == 0)


# Each with the words that TGI has for it.
RULES = [
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.5}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": 5000}, "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2 `inputs` tokens and 5000"),
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"stop": [""]}, "`stop` holds an empty string"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 2047. Given: 0"),
    ({"truncate": 5000}, "`truncate` must be strictly positive and less than 2047. Given: 5000"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"watermark": True}, "`watermark` is not supported"),
    ({"adapter_id": "x"}, "`adapter_id` is not supported"),
    ({"seed": -1}, "`seed` must be from 0"),
]


@pytest.mark.parametrize("parameters, message", RULES)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_rules(server, path, parameters, message):
    answer = server.post(path, {"inputs": "a", "parameters": parameters})
    assert answer.status_code == 422 and answer.json()["error_type"] == "validation"
    assert answer.json()["error"].startswith(f"Input validation error: {message}"), answer.json()


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ],
)
def test_rules_of_streams(server, parameters, message):
    answer = server.post("/generate_stream", {"inputs": "a", "parameters": parameters})
    assert answer.json() == {"error": f"Input validation error: {message}", "error_type": "validation"}


def test_empty_and_long_inputs(server):
    answer = server.post("/generate", {"inputs": ""})
    assert answer.json()["error"] == "Input validation error: `inputs` cannot be empty"
    answer = server.post("/generate", {"inputs": "a b " * 1100})
    assert answer.json()["error"].startswith(
        "Input validation error: `inputs` must have less than 2047 tokens. Given: "
    )


@pytest.mark.parametrize(
    "body, told",
    [
        ({}, "inputs: Field required"),
        ({"inputs": 5}, "inputs: Input should be a valid string"),
        ({"inputs": "a", "parameters": {"temperature": "1"}}, "parameters.temperature: Input should be a valid number"),
        ({"inputs": "a", "parameters": {"do_sample": 1}}, "parameters.do_sample: Input should be a valid boolean"),
        ([], "Input should be"),
    ],
)
def test_a_wrong_type_is_told_in_plain_text(server, body, told):
    answer = server.post("/generate", body)
    assert answer.status_code == 422 and answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("Failed to deserialize the JSON body into the target type: ") and told in answer.text


def test_unknown_fields_are_ignored(server):
    assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, "x": 1}, "y": 2}).is_success
