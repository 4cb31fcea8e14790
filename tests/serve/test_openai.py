"""The OpenAI client in Python, as its users call it, and what its routes add to TGI's."""

import json
import re

import jsonschema
import openai
import pydantic
import pytest
from serving import DATA_URI, SAMPLE

SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["star", "heart"]}, "count": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}},
            "required": ["place"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["Oslo", "Rome"]}},
        },
    },
}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def ask(text, *urls):
    pictures = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def test_a_picture_reaches_the_model(client, vlm):
    """TGI loses it: it hands the template a string where the template looks for parts."""
    known = vlm.generate("Describe the picture.", [SAMPLE])
    answer = client.chat.completions.create(model="tgi", messages=ask("Describe the picture.", DATA_URI), temperature=0)
    assert answer.choices[0].message.content == known.text and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == known.prompt_tokens and answer.usage.completion_tokens == len(known.tokens)
    assert answer.object == "chat.completion" and answer.model == "minivlm-tiny"
    raw = client.chat.completions.with_raw_response.create(model="x", messages=ask("Hi"), temperature=0)
    assert float(raw.headers["x-inference-time"]) >= 0


def test_several_messages_with_pictures_and_a_system_text(server, vlm):
    messages = [
        {"role": "developer", "content": "Be brief."},
        *ask("What is this?", DATA_URI),
        {"role": "assistant", "content": "a star"},
        *ask("And this?", DATA_URI),
    ]
    told = server.post("/chat_tokenize", {"messages": messages}).json()
    roles = [{"role": "system", "content": "Be brief."}, *messages[1:]]
    for message in roles:
        if isinstance(message["content"], list):
            words = message["content"][1]
            message["content"] = [{"type": "image"}, words]
    assert told["templated_text"] == vlm.processor.render(roles)
    expected = vlm.processor(told["templated_text"], [SAMPLE, SAMPLE]).ids
    assert [token["id"] for token in told["tokenize_response"]] == list(expected)


def test_a_stream_with_usage(client, vlm):
    known = vlm.generate("Describe the picture.", [SAMPLE])
    chunks = list(
        client.chat.completions.create(
            model="tgi",
            messages=ask("Describe the picture.", DATA_URI),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in told) == known.text
    assert told[0].choices[0].delta.role == "assistant" and told[-1].choices[0].finish_reason == "stop"
    assert {chunk.choices[0].finish_reason for chunk in told[:-1]} == {None}
    assert last.choices == [] and last.usage.total_tokens == known.prompt_tokens + len(known.tokens)


def test_the_clients_own_accumulator(client):
    with client.chat.completions.stream(model="m", messages=ask("Is it red?"), temperature=0, seed=1) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.role == "assistant" and final.choices[0].message.content


def test_logprobs_are_the_models_own(client, vlm):
    known = vlm.generate("Describe the picture.", [SAMPLE])
    arguments = {"model": "m", "messages": ask("Describe the picture.", DATA_URI), "temperature": 0}
    answer = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    for token, own in zip(content, known.tokens, strict=True):  # the end-of-text token included, as in TGI
        assert token.logprob == pytest.approx(own.logprob, abs=0.05)
        assert len(token.top_logprobs) == 2
        first = token.top_logprobs[0]
        assert (first.token, first.bytes, first.logprob) == (token.token, token.bytes, token.logprob)
    *words, end = content
    assert (end.token, end.bytes) == ("</s>", None)
    assert all(bytes(token.bytes).decode() == token.token for token in words)
    assert "".join(token.token for token in words) == known.text
    chunks = list(client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2, stream=True))
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [(one.token, one.bytes) for one in streamed] == [(one.token, one.bytes) for one in content]
    assert [len(chunk.choices[0].logprobs.content) for chunk in chunks[1:]] == [1] * len(content)
    assert client.chat.completions.create(**arguments).choices[0].logprobs is None


@pytest.mark.parametrize("regex", ["[\u2603\U0001f389]{4}", " [a-z]{5}", "[a-z \u00e9]{9}"])
def test_tokens_bytes_and_top_logprobs_agree(server, regex):
    """Characters of several tokens, a blank at the start; on TGI's route, too."""
    form = {"type": "regex", "value": regex}
    body = {"messages": ask("Hi"), "response_format": form, "temperature": 9.0, "seed": 3, "logprobs": True}
    (choice,) = server.post("/v1/chat/completions", body | {"top_logprobs": 5}).json()["choices"]
    content, said = choice["logprobs"]["content"], choice["message"]["content"]
    assert re.fullmatch(regex, said)
    assert bytes(byte for entry in content for byte in entry["bytes"] or ()).decode() == said
    for entry in content:
        same = [one for one in entry["top_logprobs"] if one["logprob"] == entry["logprob"]]
        assert all((one["token"], one["bytes"]) == (entry["token"], entry["bytes"]) for one in same if len(same) == 1)
        for one in (entry, *entry["top_logprobs"]):
            if re.fullmatch(r"\\x[0-9a-f]{2}", one["token"]):
                assert one["bytes"] == [int(one["token"][2:], 16)]
            else:
                assert one["token"] == "</s>" if one["bytes"] is None else bytes(one["bytes"]).decode() == one["token"]
    parameters = {"grammar": form, "temperature": 9.0, "seed": 3, "details": True}
    answer = server.post("/generate", {"inputs": "a", "parameters": parameters}).json()
    words = [token["text"] for token in answer["details"]["tokens"] if not token["special"]]
    assert "".join(words) == answer["generated_text"]


def test_stop_seed_n_and_the_end_by_length(client, vlm):
    known = vlm.generate("Describe the picture.", [SAMPLE]).text
    arguments = {"model": "m", "messages": ask("Describe the picture.", DATA_URI)}
    for stop in (known[6:9], [known[6:9], "never"]):
        choice = client.chat.completions.create(**arguments, temperature=0, stop=stop).choices[0]
        assert choice.message.content == known[: known.index(known[6:9])] and choice.finish_reason == "stop"
    short = client.chat.completions.create(**arguments, temperature=0, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    hot = arguments | {"temperature": 2.0, "top_p": 1.0, "max_tokens": 12, "seed": 5}
    first, again = (client.chat.completions.create(**hot, n=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 2
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**hot, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert streamed == texts


def test_the_last_message_is_continued_if_it_is_the_assistants(server, vlm):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a red"}]
    text = server.post("/chat_tokenize", {"messages": messages}).json()["templated_text"]
    assert text == "[INST] Hi [/INST] a red"
    answer = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0}).json()
    known = vlm.generate(text, raw=True).text
    assert answer["choices"][0]["message"]["content"] == known


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_json_object_and_parse(client, stream):
    hot = {"model": "m", "messages": ask("Hi"), "temperature": 5.0, "max_tokens": 60}

    def text(form):
        answer = client.chat.completions.create(**hot, response_format=form, stream=stream)
        if stream:
            return "".join(chunk.choices[0].delta.content for chunk in answer)
        return answer.choices[0].message.content

    named = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    jsonschema.validate(json.loads(text(named)), SCHEMA)
    assert isinstance(json.loads(text({"type": "json_object"})), dict)
    assert text({"type": "text"}) is not None


def test_parse_with_a_pydantic_model(client):
    class Thing(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=5)
        big: bool

    answer = client.chat.completions.parse(model="m", messages=ask("Hi"), response_format=Thing, max_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Thing)


@pytest.mark.parametrize("path, asked", [
    ("/v1/chat/completions", {"messages": ask("Hi")}), ("/v1/completions", {"prompt": "Hi"})
])  # fmt: skip
def test_a_negative_temperature(server, path, asked):
    """Not "strictly positive", as on TGI's routes: here 0 is greedy."""
    answer = server.post(path, asked | {"temperature": -1.0})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].endswith("`temperature` must be 0, which is greedy, or positive")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("temperature", [0, 5.0])
def test_tools(client, choice, temperature):
    arguments = {"model": "m", "messages": ask("Hi"), "tools": [WEATHER], "tool_choice": choice,
                 "temperature": temperature, "max_tokens": 60}  # fmt: skip
    answer = client.chat.completions.create(**arguments).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather" and answer.message.content is None
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    with client.chat.completions.stream(**arguments) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["place"] in ("Oslo", "Rome")
    dialogue = [*ask("Hi"), {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
                {"role": "tool", "tool_call_id": call.id, "content": "rain"}]  # fmt: skip
    assert client.chat.completions.create(model="m", messages=dialogue).choices[0].finish_reason


def test_auto_may_talk_or_call_and_none_may_not(client):
    arguments = {"model": "m", "messages": ask("Hi"), "tools": [WEATHER], "max_tokens": 80, "temperature": 5.0}
    kinds = set()
    for seed in range(4):
        answer = client.chat.completions.create(**arguments, seed=seed).choices[0]
        assert (answer.message.tool_calls is None) == (answer.message.content is not None)
        assert answer.finish_reason == ("stop" if answer.message.tool_calls is None else "tool_calls")
        chunks = client.chat.completions.create(**arguments, seed=seed, stream=True)
        told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert told == (answer.message.content or "")
        kinds.add(answer.finish_reason)
    assert kinds == {"stop", "tool_calls"}
    none = client.chat.completions.create(**arguments, tool_choice="none")
    assert none.choices[0].message.tool_calls is None


def test_tools_that_contradict(server):
    body = {"messages": ask("Hi"), "tools": [WEATHER]}
    answer = server.post("/v1/chat/completions", body | {"tool_choice": "other"})
    assert answer.status_code == 422 and answer.json()["error_type"] == "tool_error"
    answer = server.post("/v1/chat/completions", body | {"response_format": {"type": "json_object"}})
    assert answer.status_code == 422 and "exclude each other" in answer.json()["error"]["message"]


def test_completions(client, vlm):
    prompt = "[INST] Is it red? [/INST]"
    known = vlm.generate(prompt, raw=True)
    answer = client.completions.create(model="m", prompt=prompt, temperature=0, logprobs=1, echo=True)
    assert answer.choices[0].text == prompt + known.text and answer.choices[0].finish_reason == "stop"
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == [known.text, "</s>"]
    assert logprobs.text_offset == [len(prompt), len(answer.choices[0].text)]
    assert [next(iter(one)) for one in logprobs.top_logprobs] == logprobs.tokens
    assert logprobs.token_logprobs[0] == pytest.approx(known.tokens[0].logprob, abs=0.05)
    greedy = client.completions.create(
        model="m", prompt=prompt, temperature=0, extra_body={"typical_p": 0.01, "top_k": 9}
    )
    assert greedy.choices[0].text == known.text  # 0 is greedy, whatever is beside it
    several = client.completions.create(model="m", prompt=[prompt, "[INST] What is it? [/INST]"], temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1] and several.choices[0].text == known.text
    picture = client.completions.create(model="m", prompt=f"![]({DATA_URI})", temperature=0, max_tokens=3)
    assert picture.usage.prompt_tokens > 200


def test_a_streamed_completion_is_in_both_shapes(client, server, vlm):
    prompt = "[INST] Is it red? [/INST]"
    known = vlm.generate(prompt, raw=True)
    arguments = {"model": "http://127.0.0.1:1", "prompt": prompt, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(**arguments, stream_options={"include_usage": True}))
    *told, last = chunks
    assert "".join(chunk.choices[0].text for chunk in told) == known.text and last.usage.completion_tokens == len(told)
    *events, done = server.events("/generate_stream/v1/completions", arguments)
    assert done == "[DONE]" and [event["token"]["id"] for event in events] == [token.id for token in known.tokens]
    assert events[-1]["generated_text"] == known.text and events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[0]["choices"][0]["finish_reason"] == "" and events[0]["index"] == 1
    assert server.events("/generate/v1/completions", arguments)[0]["token"] == events[0]["token"]


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["minivlm-tiny"]


def test_errors_are_the_clients_own(client, strict):
    with pytest.raises(openai.UnprocessableEntityError, match="not a picture"):
        client.chat.completions.create(model="m", messages=ask("Hi", "data:image/png;base64,aGVsbG8="))
    with pytest.raises(openai.UnprocessableEntityError, match="top_n_tokens"):
        client.chat.completions.create(model="m", messages=ask("Hi"), logprobs=True, top_logprobs=20)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="m", input="Hi")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="wrong").chat.completions.create(
            model="m", messages=ask("Hi")
        )


def refused(server, **fields):
    answer = server.post("/v1/chat/completions", {"messages": ask("Hi")} | fields)
    assert answer.status_code == 422
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_penalties_are_the_pipelines_own(client, vlm, stream):
    """Greedy among four shapes, so that the answers are known, and what each penalty does is seen."""
    words = ("circle", "star", "cross", "heart")
    bias = {vlm.processor.tokenizer.encode(word, add_bos=False)[-1]: 60 for word in words}
    settings, told = {"max_new_tokens": 12, "logit_bias": bias}, set()
    asked = {"model": "m", "temperature": 0, "max_tokens": 12, "logit_bias": {str(i): 60 for i in bias}}
    question, prompt = "Describe the picture.", "[INST] Is it red? [/INST]"
    for penalties in ({}, {"presence_penalty": 2}, {"presence_penalty": -2.0}, {"frequency_penalty": 2.0},
                      {"presence_penalty": 1.5, "frequency_penalty": 0.5}):  # fmt: skip
        known = vlm.generate(question, [SAMPLE], **settings, **penalties).text
        told.add(known)
        answer = client.chat.completions.create(messages=ask(question, DATA_URI), **asked, **penalties, stream=stream)
        if stream:
            assert "".join(chunk.choices[0].delta.content for chunk in answer) == known
        else:
            assert answer.choices[0].message.content == known
        answer = client.completions.create(prompt=prompt, **asked, **penalties, stream=stream)
        text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        assert text == vlm.generate(prompt, raw=True, **settings, **penalties).text
    assert len(told) == 5


def test_a_bias_forbids_and_forces(client, vlm):
    known = vlm.generate("Describe the picture.", [SAMPLE])
    first, word = known.tokens[0].id, vlm.processor.tokenizer.encode("circle", add_bos=False)[-1]
    arguments = {"model": "m", "messages": ask("Describe the picture.", DATA_URI), "temperature": 0, "max_tokens": 4}
    other = client.chat.completions.create(**arguments, logit_bias={str(first): -100})
    settings = {"max_new_tokens": 4, "logit_bias": {first: -100}}
    assert other.choices[0].message.content == vlm.generate("Describe the picture.", [SAMPLE], **settings).text
    assert not known.text.startswith(other.choices[0].message.content)
    arguments |= {"logit_bias": {str(word): 100}, "logprobs": True}
    for more in ({}, {"temperature": 1.5, "seed": 1}):
        choice = client.chat.completions.create(**arguments | more).choices[0]
        tokens = choice.logprobs.content
        assert choice.finish_reason == "length" and [token.token.strip() for token in tokens] == ["circle"] * 4
        assert min(token.logprob for token in tokens) < -1  # of the model's own distribution
    text = client.completions.create(model="m", prompt="Hi", logit_bias={str(word): 100}, max_tokens=3).choices[0].text
    assert text.split() == ["circle"] * 3
    form = {"type": "regex", "value": "no"}
    forced = client.chat.completions.create(**arguments, extra_body={"response_format": form})
    assert forced.choices[0].message.content == "no"  # a grammar allows, a bias only adds


@pytest.mark.parametrize("path, asked", [
    ("/v1/chat/completions", {"messages": ask("Hi")}), ("/v1/completions", {"prompt": "Hi", "stream": True}),
    ("/invocations", {"messages": ask("Hi")})
])  # fmt: skip
@pytest.mark.parametrize("fields, message", [
    ({"presence_penalty": 2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"logit_bias": {"5": 100.5}}, "`logit_bias` of 5: found 100.5, expected a number from -100 to 100"),
    ({"logit_bias": {"5": -101}}, "`logit_bias` of 5: found -101, expected a number from -100 to 100"),
    ({"logit_bias": {"cat": 1}}, "`logit_bias`: found the key 'cat', expected the id of a token, a whole number"),
    ({"logit_bias": {"05": 1}}, "`logit_bias`: found the key '05', expected"),
    ({"logit_bias": {"-5": 1}}, "`logit_bias`: found the key '-5', expected"),
    ({"logit_bias": {"٥": 1}}, "`logit_bias`: found the key '٥', expected"),
    ({"logit_bias": {"9" * 5000: 1}}, "`logit_bias`: found the key '99999999999999999999', expected"),
    ({"logit_bias": {"5": 1, "719": 1}}, "logit_bias: found id 719, expected ids below 719, the vocabulary's size"),
    ({"logit_bias": dict.fromkeys(map(str, range(1025)), 0)}, "`logit_bias`: found 1025 ids, expected at most 1024"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5: Input should be a valid number"),
])  # fmt: skip
def test_penalties_and_biases_out_of_range(server, path, asked, fields, message):
    answer = server.post(path, asked | fields)
    assert answer.status_code == 422 and message in answer.text and len(answer.text) < 600, answer.text


def test_what_is_not_done_is_refused_not_ignored(server):
    assert "`n` must be > 0 and <= 2. Given: 3" in refused(server, n=3)
    assert "expected `logprobs` to be true" in refused(server, top_logprobs=2)
    assert server.post("/v1/chat/completions", {"messages": ask("Hi"), "presence_penalty": 0, "frequency_penalty": 0,
                                                "logit_bias": {}, "user": "u", "top_p": 1}).is_success  # fmt: skip


BAD_GRAMMARS = [
    {"type": "json", "value": {"type": "nonsense"}},
    {"type": "json", "value": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}},
    {"type": "json", "value": "{"},
    {"type": "regex", "value": "("},
    {"type": "regex", "value": 5},
    {"type": "json_schema"},
    {"type": "xml", "value": "x"},
    {"type": "json"},
]


@pytest.mark.parametrize("grammar", BAD_GRAMMARS)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_bad_schema_is_told_when_the_request_arrives(server, path, grammar):
    answer = server.post(path, {"inputs": "a", "parameters": {"grammar": grammar}})
    assert answer.status_code == 422 and re.search("grammar", answer.text)


@pytest.mark.parametrize("form", [
    {"type": "json", "value": SCHEMA}, {"type": "json", "value": json.dumps(SCHEMA)},
    {"type": "json_object", "value": SCHEMA}, {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}},
    {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
])  # fmt: skip
def test_every_way_to_write_a_schema(server, form):
    parameters = {"grammar": form, "temperature": 4.0, "max_new_tokens": 50}
    answer = server.post("/generate", {"inputs": "a", "parameters": parameters}).json()
    jsonschema.validate(json.loads(answer["generated_text"]), SCHEMA)
    assert server.post("/v1/chat/completions", {"messages": ask("Hi"), "response_format": form}).is_success


def test_a_regex(server):
    parameters = {"grammar": {"type": "regex", "value": "[0-9]{3}-[a-f]{2}"}, "temperature": 4.0, "details": True}
    answer = server.post("/generate", {"inputs": "a", "parameters": parameters}).json()
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", answer["generated_text"])
