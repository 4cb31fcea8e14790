"""A training run: killed and resumed it follows the same curve, and its checkpoint loads everywhere."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import minivlm
from minivlm.errors import InputError, NumericError
from minivlm.train import recipe, run
from minivlm.train.loop import run_stage
from minivlm.train.optim import cosine
from minivlm.train.state import alone, load_modules

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs PyTorch 2.9's Muon")
# All stages, two steps each.
SMALL = tuple(replace(stage, steps=2, batch=2, warmup=1) for stage in recipe.STAGES)
# In a stage's reach, but not in its loss: what lies behind the tapped layer, which LLaVA never runs, and the head of
# the other encoder stage.
UNUSED = {
    "encoder": ("vlm.vision_tower.post_layernorm.", "heads.places."),
    "places": ("vlm.vision_tower.post_layernorm.", "heads.box."),
}


def train(folder, stages=SMALL):
    return run.train(folder, stages, "cpu", workers=0, save_seconds=0.0)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def test_a_killed_run_resumes_with_the_same_loss_curve(finished, tmp_path, monkeypatch):
    """The process dies right after a state was written, three times; run again, log and weights equal an undisturbed
    run's."""
    from minivlm.train import loop

    class Killed(BaseException):
        pass

    kills, save_state = [("encoder", 1), ("projector", 1), ("tune", 2)], loop.save_state

    def save_and_die(folder, progress, modules, optimizers):
        save_state(folder, progress, modules, optimizers)
        if kills and (progress.stage, progress.step) == kills[0]:
            kills.pop(0)
            raise Killed

    monkeypatch.setattr(loop, "save_state", save_and_die)
    for _ in range(3):
        with pytest.raises(Killed):
            train(tmp_path)
    train(tmp_path)
    assert log(tmp_path) == log(finished)
    name = "checkpoint/model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_run_is_not_trained_again(finished):
    before = (finished / "log.jsonl").read_bytes()
    train(finished)
    assert (finished / "log.jsonl").read_bytes() == before


def test_another_recipe_is_refused(finished):
    with pytest.raises(InputError, match="another recipe"):
        train(finished, (replace(SMALL[0], lr=1.0), *SMALL[1:]))


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    """A run that begins writes over nobody's files, whatever their names."""
    for name in ("tokenizer.json", "log.jsonl", "notes.txt"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match="holds no training run"):
            train(folder)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]
    with pytest.raises(InputError, match="not an empty folder"):
        train(tmp_path / "notes" / "notes.txt")


def test_a_run_killed_while_it_wrote_a_state_leaves_what_the_next_one_takes_up(tmp_path):
    """The real leftovers, of a process that dies between the bytes and the rename."""
    code = (
        "import os, sys, pathlib\n"
        "from minivlm.train import run, state\n"
        "state.os.replace = lambda *_: os._exit(9)\n"
        "run.train(pathlib.Path(sys.argv[1]), run.recipe.SMALL_STAGES, 'cpu', 0, 0.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == 9 and [path.name for path in tmp_path.glob("*.part")] == [".state.safetensors.part"]
    assert run.standing(tmp_path, SMALL) is None
    train(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_two_runs_are_never_at_work_in_one_folder(tmp_path):
    with alone(tmp_path), pytest.raises(InputError, match="another process is training in it"):
        train(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"modules.vlm.image_newline": torch.zeros(1, 256)}, "image_newline has shape"),
        (lambda t: t | {"optimizers.9.0.x": torch.zeros(1)}, "optimizers.9.0.x is not of"),
        (lambda t: t | {"optimizers.0.99999.x": torch.zeros(1)}, "optimizers.0.99999.x is not of"),
        (lambda t: t | {"optimizers.junk": torch.zeros(1)}, "optimizers.junk is not of"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("optim")}, "moments are missing"),
        (lambda t: {k: v for k, v in t.items() if "image_newline" not in k}, "parameters differ"),
    ],
)
def test_a_damaged_state_is_named(finished, tmp_path, change, message):
    path = finished / "state.safetensors"
    metadata = {"recipe": recipe.fingerprint(SMALL), "stage": "tune", "step": "1"}
    save_file(change(load_file(path)), tmp_path / path.name, metadata)
    with pytest.raises(InputError, match=message):
        train(tmp_path)


def test_a_step_beyond_the_stage_is_refused(finished, tmp_path):
    metadata = {"recipe": recipe.fingerprint(SMALL), "stage": "tune", "step": "99"}
    save_file(load_file(finished / "state.safetensors"), tmp_path / "state.safetensors", metadata)
    with pytest.raises(InputError, match="another recipe"):
        train(tmp_path)


def test_a_log_line_cut_short_is_dropped_and_another_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "log.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"stage": "tu')
    train(tmp_path / "run")
    assert path.read_text() == whole
    path.write_text("half\n" + whole)
    with pytest.raises(InputError, match="line 1 is not a report"):
        train(tmp_path / "run")


def test_a_state_without_a_number_of_steps_is_refused(tmp_path):
    metadata = {"recipe": "x", "stage": "tune", "step": "many"}
    save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors", metadata)
    with pytest.raises(InputError, match="step 'many' is not a number of steps"):
        train(tmp_path)


def test_the_checkpoint_loads_here_and_in_transformers(finished):
    folder = finished / "checkpoint"
    ours = minivlm.load(folder, backend="reference")
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    inputs = ours.processor("[INST] Is there a red star? [/INST]")
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([inputs.ids])).logits[0]
        assert torch.equal(ours.model([inputs]), logits)
    assert logits.dtype == torch.bfloat16


def test_a_stage_moves_only_what_it_trains(tmp_path):
    """Stage by stage, the parameters that changed are exactly those the recipe names."""
    processor = run.new_processor()
    for stage in SMALL:
        modules, working = run.new_modules(processor), run.new_modules(processor).to(torch.bfloat16)
        before = {name: parameter.clone() for name, parameter in modules.named_parameters()}
        run_stage(stage, 0, "x", tmp_path, modules, working, run.task_of(stage, working, processor), 1e9, 0)
        moved = {name for name, value in modules.named_parameters() if not torch.equal(value, before[name])}
        assert moved
        assert all(name.startswith(stage.trains) for name in moved)
        still = {name for name in before if name.startswith(stage.trains)} - moved
        assert all(name.startswith(UNUSED.get(stage.name, ("nothing",))) for name in still)


def test_untrained_attention_attends_to_what_is_alike(tmp_path):
    """Without rotary angles, a query's best key among random vectors is its own: in every head of every layer."""
    vlm = run.new_modules(run.new_processor())["vlm"]
    vectors = torch.randn(64, vlm.config.text.hidden_size)
    for layer in vlm.language_model.layers:
        attention = layer.self_attn
        q = attention.q_proj(vectors).unflatten(-1, (-1, attention.head_dim))  # [S, H, C]
        k = attention.k_proj(vectors).unflatten(-1, (-1, attention.head_dim))  # [S, K, C]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhc,khc->hqk", q, k)
        assert (scores.argmax(-1) == torch.arange(64)).float().mean() > 0.95


def test_the_projectors_stage_begins_with_a_new_projector(finished, tmp_path):
    """LLaVA's first stage aligns an untrained projector, whatever the decoder was warmed up with."""
    processor = run.new_processor()
    untrained, modules = run.new_modules(processor), run.new_modules(processor)
    load_modules(finished, modules)
    run.renew(modules, recipe.PROJECTOR.renews, processor)
    for (name, value), new in zip(modules.named_parameters(), untrained.parameters(), strict=True):
        if name.startswith(recipe.PROJECTOR.trains):
            assert torch.equal(value, new), name
        elif name.startswith("vlm.language_model.layers."):
            assert not torch.equal(value, new), name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    processor = run.new_processor()
    modules, working = run.new_modules(processor), run.new_modules(processor).to(torch.bfloat16)
    decoder = next(stage for stage in SMALL if stage.name == "decoder")
    task = run.task_of(decoder, working, processor)

    class Broken:
        make_batch, held_out = task.make_batch, task.held_out

        def loss(self, batch):
            loss, report = task.loss(batch)
            return loss * float("nan"), report

    with pytest.raises(NumericError, match="stage decoder, step 1: the loss is nan"):
        run_stage(decoder, 0, "x", tmp_path, modules, working, Broken(), 1e9, 0)


def test_cosine_is_the_example_of_its_docstring():
    assert [cosine(step, 100, 10) for step in (0, 9, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])
