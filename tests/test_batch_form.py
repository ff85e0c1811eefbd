"""Which form a run's batches take: the cheapest that its first question shows to be exact."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from families import make_world

from rollouts import Prompt
from sail_rl.batch import Group
from sail_rl.batch_form import choose_form
from sail_rl.command_line import BadInput
from sail_rl.config import UpdateSection
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.model import prefix_sharing
from sail_rl.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def world():
    world = make_world("tiny")
    Policy(world.model)
    return world


@pytest.fixture
def groups(world):
    return [Group(prompt, [[20, 21, 22], [30], [40, 41]]) for prompt in world.prompts[:3]]


def run_of(mode, shard=None):
    recipe = SimpleNamespace(update=UpdateSection(mode=mode))
    return Run(recipe, None, Accelerator(cpu=True), shard or Shard())


@pytest.mark.parametrize(
    ("mode", "form"), [("auto", "shared"), ("shared", "shared"), ("packed", "packed"), ("padded", "padded")]
)
def test_what_the_recipe_asks_for(world, groups, capsys, mode, form):
    assert choose_form(run_of(mode), world.model, groups) == form
    assert f"update: {form} batches" in capsys.readouterr().out


def test_nothing_is_decided_without_a_question(world):
    assert choose_form(run_of("auto"), world.model, []) is None


def test_a_process_without_questions_follows_the_others(world):
    others = Shard(0, 2, gather=lambda mine: [*mine, 1] if isinstance(mine[0], int) else [*mine, 0.5])
    assert choose_form(run_of("auto", others), world.model, []) == "padded"


def test_auto_names_what_stands_in_the_way(world, groups, capsys):
    world.model.config.text_config.attention_dropout = 0.1
    assert choose_form(run_of("auto"), world.model, groups) == "padded"
    told = capsys.readouterr().out
    assert "shared rows would not be exact for SailVL2ForConditionalGeneration: its attention_dropout is 0.1" in told
    with pytest.raises(BadInput, match=r"update\.mode = shared: .*attention_dropout is 0\.1; set update\.mode=padded"):
        choose_form(run_of("shared"), world.model, groups)


def test_a_difference_is_found_by_trying(world, groups, capsys, monkeypatch):
    """Attention that lets a token see itself alone: every form of one row is given up."""

    def blind(module, query, key, value, mask, layout=None, **kwargs):
        tokens = query.shape[2]
        wrong = layout and prefix_sharing.Layout((1,) * tokens, (None,) * tokens)
        return prefix_sharing.segment_attention(module, query, key, value, mask, layout=wrong, **kwargs)

    monkeypatch.setitem(prefix_sharing.AttentionInterface._global_mapping, prefix_sharing.ATTENTION, blind)
    assert choose_form(run_of("auto"), world.model, groups) == "padded"
    assert capsys.readouterr().out.count("log-probabilities differ by") == 2
    with pytest.raises(BadInput, match="log-probabilities differ by"):
        choose_form(run_of("packed"), world.model, groups)


def test_training_mode_is_left_as_it_was(world, groups):
    for training in (True, False):
        world.model.train(training)
        choose_form(run_of("auto"), world.model, groups)
        assert world.model.training == training


def test_text_alone_is_a_question_too(world):
    assert choose_form(run_of("auto"), world.model, [Group(Prompt("", [10, 11, 12]), [[13], []])]) == "shared"
