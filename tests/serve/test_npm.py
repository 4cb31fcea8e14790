"""The JavaScript clients, current and older, each with the snippet that its documents show.

Set up once with `npm ci --prefix tests/serve/npm` (Node 20 or newer), then `pytest -m npm tests/serve/test_npm.py`.
"""

import json
import subprocess
from pathlib import Path

import pytest
from serving import DATA_URI, SAMPLE

pytestmark = pytest.mark.npm
FOLDER = Path(__file__).parent / "npm"
PROMPT = f"![]({DATA_URI})What is written?\n\n"
QUESTION = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA_URI}},
                                         {"type": "text", "text": "Describe the picture."}]}]  # fmt: skip

STREAM = """
import { %s } from "%s";
const hf = %s;
for await (const r of hf.textGenerationStream({ inputs: input.prompt,
    parameters: { max_new_tokens: 16, seed: 42, do_sample: false } })) {
  process.stdout.write(r.token.text);
}
"""
# Version 2 asks the hub which model it would use if there were no endpoint; here the hub is not reached.
NO_HUB = """
const real = globalThis.fetch;
const tasks = JSON.stringify({ "text-generation": { models: [{ id: "any" }] } });
globalThis.fetch = (url, ...rest) =>
  String(url).startsWith("https://huggingface.co/") ? Promise.resolve(new Response(tasks)) : real(url, ...rest);
"""
NEW, OLD, OLDEST = "@huggingface/inference", "huggingface-inference-3", "huggingface-inference-2"
CLIENTS = [
    (NEW, "InferenceClient", "new {name}('hf_token', {{ endpointUrl: input.url }})"),
    (NEW, "HfInference", "new {name}().endpoint(input.url)"),
    (NEW, "HfInference", "new {name}().endpoint(input.url + '/generate_stream')"),
    (NEW, "HfInference", "new {name}().endpoint(input.url + '/generate')"),
    (OLD, "InferenceClient", "new {name}('hf_token', {{ endpointUrl: input.url }})"),
    (OLD, "HfInference", "new {name}().endpoint(input.url)"),
    (OLDEST, "HfInferenceEndpoint", "new {name}(input.url, 'hf_token')"),  # exported until version 3
    (OLDEST, "HfInference", "new {name}().endpoint(input.url)"),
]


def run(server, script, **more):
    """What a script wrote; `input` holds the server's address, a prompt and messages."""
    given = {"url": server.url, "prompt": PROMPT, "messages": QUESTION, **more}
    source = f"import {{ readFileSync }} from 'fs'; const input = JSON.parse(readFileSync(0));\n{script}"
    done = subprocess.run(["node", "--input-type=module", "-e", source], input=json.dumps(given), cwd=FOLDER,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(vlm):
    return vlm.generate("<image>What is written?\n\n", [SAMPLE], raw=True).text


@pytest.fixture(scope="module")
def described(vlm):
    return vlm.generate("Describe the picture.", [SAMPLE]).text


@pytest.mark.parametrize("package, name, client", CLIENTS)
def test_the_well_known_snippet(server, package, name, client, written):
    """It prints `r.token.text`; the current version asks /v1/completions for it, older ones ask /."""
    script = STREAM % (name, package, client.format(name=name))
    assert run(server, (NO_HUB if package == OLDEST else "") + script) == written + "</s>"


@pytest.mark.parametrize("package", [NEW, OLD])
def test_text_generation_and_chat(server, package, written, described):
    script = f"""
    import {{ HfInference }} from "{package}";
    const hf = new HfInference(undefined).endpoint(input.url);
    const whole = await hf.textGeneration({{ inputs: input.prompt, parameters: {{ do_sample: false }} }});
    const chat = await hf.chatCompletion({{ messages: input.messages, temperature: 0, max_tokens: 100 }});
    let streamed = "";
    for await (const c of hf.chatCompletionStream({{ messages: input.messages, temperature: 0, max_tokens: 100 }}))
      streamed += c.choices[0].delta.content;
    console.log(JSON.stringify([whole.generated_text, chat.choices[0].message.content, streamed]));
    """
    assert json.loads(run(server, script)) == [written, described, described]


def test_questions_about_a_picture(server, vlm):
    """imageToText wants an object where huggingface_hub wants a list, and gets the list."""
    script = """
    import { InferenceClient } from "@huggingface/inference";
    const hf = new InferenceClient("hf_token", { endpointUrl: input.url });
    const image = await (await fetch(input.picture)).blob();
    const inputs = { image, question: "What is shown?" };
    const visual = await hf.visualQuestionAnswering({ inputs });
    const document = await hf.documentQuestionAnswering({ inputs });
    console.log(JSON.stringify([visual.answer, document.answer]));
    """
    known = vlm.generate("What is shown?", [SAMPLE]).text
    assert json.loads(run(server, script, picture=DATA_URI)) == [known, known]


def test_openai(server, described):
    script = """
    import OpenAI from "openai";
    const client = new OpenAI({ baseURL: input.url + "/v1", apiKey: "-" });
    const common = { model: "tgi", messages: input.messages, temperature: 0 };
    const whole = await client.chat.completions.create({ ...common, logprobs: true, top_logprobs: 2 });
    let streamed = "", usage;
    for await (const c of await client.chat.completions.create(
        { ...common, stream: true, stream_options: { include_usage: true } })) {
      streamed += c.choices[0]?.delta.content ?? "";
      usage = c.usage ?? usage;
    }
    const schema = { type: "object", properties: { n: { type: "integer", maximum: 9 } }, required: ["n"] };
    const form = { type: "json_schema", json_schema: { name: "thing", schema } };
    const json = await client.chat.completions.create(
        { ...common, seed: 1, stop: ["never"], response_format: form, max_tokens: 40 }).catch((e) => e.message);
    const guided = await client.chat.completions.create({ ...common, response_format: form, max_tokens: 40 });
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    let completed = "";
    for await (const c of await client.completions.create({ model: "x", prompt: input.prompt, stream: true,
        temperature: 0 })) completed += c.choices[0].text;
    console.log(JSON.stringify({ whole: whole.choices[0].message.content, streamed, usage, json, models, completed,
        tokens: whole.choices[0].logprobs.content.length, guided: guided.choices[0].message.content }));
    """
    told = json.loads(run(server, script))
    assert told["whole"] == told["streamed"] == described and told["models"] == ["minivlm-tiny"]
    assert told["usage"]["completion_tokens"] == told["tokens"]
    assert told["completed"] and told["json"].startswith("422") and "stop" in told["json"]
    assert isinstance(json.loads(told["guided"])["n"], int)
