"""Scenario files: found, inherited, overridden, refused by path, written and read back; and the page about them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.settings import Partition
from node.task_loading import make_task
from node.tasks import partition_indices
from protocols.errors import ConfigError
from sim import field_docs, timeline
from sim.churn import TRACE_COLUMNS
from sim.field_docs import describe
from sim.scenario_files import (
    OWNED,
    convert,
    load,
    names,
    show,
    to_toml,
    validate,
    validate_rule,
    with_fields,
)
from sim.scenarios import DataSettings, Scenario

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scenarios.md").read_text(encoding="utf-8")
BUILTIN = [name for name, _ in names()]


def refused(overrides: list[str], source: str = "baseline") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validate(*load(source, overrides))
    return caught.value


def save(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_scenarios_are_read_without_torch() -> None:
    code = "import sys, sim.scenarios, sim.scenario_files as f; f.validate(*f.load('churn')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- the built-in ones ----------------------------------------------------------------------------------
def test_there_is_one_for_each_thing_to_see() -> None:
    promised = {
        *("baseline", "push-gossip", "churn", "mass-failure", "partition", "slow-devices", "non-iid"),
        *(
            "late-merge",
            "single-merge",
            "wide-area",
            "thousand",
            "ten-thousand",
            "ten-thousand-dry",
            "scalars",
            "membership",
            "islands",
            "sampled",
        ),
    }
    assert set(BUILTIN) == promised
    assert all(20 < len(summary) < 110 for _, summary in names())


@pytest.mark.parametrize("name", BUILTIN)
def test_a_built_in_scenario_is_sound_and_explains_itself(name: str) -> None:
    scenario, base = load(name)
    validate(scenario, base)
    validate_rule(scenario)
    assert scenario.name == name
    assert scenario.summary == dict(names())[name]
    assert "# " in show(name), "says why its values are what they are"


def test_the_data_of_the_built_in_scenarios_goes_round() -> None:
    """They all learn from the same samples, so one loading is enough."""
    learning = [
        scenario
        for name in BUILTIN
        if not (scenario := load(name)[0]).dry_run and scenario.learning != "none"
    ]
    assert {each.data.task for each in learning} == {"digits"}
    assert {str(each.data.options) for each in learning} == {"{'hidden': [32]}", "{'hidden': [16]}"}
    task = make_task("digits", {"hidden": [32]}, ROOT)
    for scenario in learning:
        data = scenario.data
        partition = Partition(
            count=scenario.nodes,
            partitioner=data.partitioner,
            alpha=data.alpha,
            shards_per_node=data.shards_per_node,
            samples_per_node=data.samples_per_node,
        )
        parts = partition_indices(task, partition)
        assert len(parts) == scenario.nodes
        assert min(map(len, parts)) > 0, scenario.name


def test_what_the_built_in_scenarios_are_about() -> None:
    def tables(name: str) -> Scenario:
        return load(name)[0]

    assert (tables("baseline").nodes, tables("baseline").rule) == (100, "corrected")
    push = tables("push-gossip").gossip
    assert (push.quorum, push.fanout) == (0, 1)
    late, single = tables("late-merge"), tables("single-merge")
    assert (late.nodes, late.topology.kind, late.data.start, late.data.alpha) == (16, "full", "common", 0.1)
    assert late.gossip.dense_rounds() == range(95, 100)
    assert late.evaluation.merged
    assert not single.gossip.has_window
    assert (single.gossip.fanout, single.gossip.final_merge) == (0.2, "butterfly")
    failure = tables("mass-failure")
    events = timeline.parse(failure.timeline, failure.nodes)
    assert [(event.action, event.share) for event in events] == [("silence", 0.8), ("wake", 0.5)]
    assert failure.nodes == 300
    assert tables("thousand").nodes == 1_000
    assert tables("ten-thousand").nodes == tables("ten-thousand-dry").nodes == 10_000
    dry = tables("ten-thousand-dry")
    assert (dry.dry_run, dry.gossip.rounds, dry.churn.model) == (True, 100, "exponential")
    assert not any(tables(name).dry_run for name in BUILTIN if name != "ten-thousand-dry")


def test_an_unknown_name_is_answered_with_those_that_are_near() -> None:
    with pytest.raises(ConfigError, match=r"scenario: there is no scenario 'churm' \(allowed: churn, "):
        load("churm")
    with pytest.raises(
        ConfigError, match=r"scenario: there is no built-in scenario 'x' \(allowed: baseline, churn"
    ):
        show("x")


# --- files ----------------------------------------------------------------------------------------------
def test_the_smallest_file_is_empty_and_the_folder_is_the_files(tmp_path: Path) -> None:
    scenario, base = load(save(tmp_path, "mine.toml", ""))
    assert scenario == msgspec.structs.replace(Scenario(), name="mine")
    assert base == tmp_path
    assert load(str(tmp_path / "mine.toml"))[0] == scenario


def test_a_table_leaves_the_rest_of_it_as_it_was(tmp_path: Path) -> None:
    """A scenario's gossip waits for everybody, though a daemon's by itself does not."""
    scenario, _ = load(save(tmp_path, "mine.toml", "[gossip]\nrounds = 7\n"))
    assert scenario.gossip == msgspec.structs.replace(Scenario().gossip, rounds=7)
    assert scenario.gossip.quorum == 1.0


def test_a_file_extends_another_table_by_table(tmp_path: Path) -> None:
    save(
        tmp_path, "below.toml",
        'extends = "churn"\nsummary = "not this"\ntimeline = ["at 1 s: heal"]\n[links]\nloss = 0.1\nsigma = 0.4\n',
    )  # fmt: skip
    (tmp_path / "sub").mkdir()
    path = save(
        tmp_path / "sub", "mine.toml",
        'extends = "../below.toml"\ntimeline = ["at 2 s: heal"]\n[links]\nloss = 0.2\n[churn]\nmodel = "none"\n',
    )  # fmt: skip
    scenario, base = load(path)
    churn = load("churn")[0]
    assert (scenario.links.loss, scenario.links.sigma) == (0.2, 0.4)
    assert scenario.timeline == ("at 2 s: heal",)
    assert scenario.churn == msgspec.structs.replace(churn.churn, model="none")
    assert scenario.gossip == churn.gossip
    assert (scenario.name, scenario.summary, base) == ("mine", "", tmp_path / "sub")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "mine.toml"', r"extends: goes in a circle: .*mine.toml -> .*mine.toml"),
        ('extends = "no-such"', r"extends: there is no scenario 'no-such'"),
        ('extends = "none.toml"', r"extends: .*none.toml cannot be read"),
        ("extends = 3", r"extends: 3 is no text"),
        ("nodes = ", r"mine.toml: is not TOML: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(save(tmp_path, "mine.toml", text))


def test_a_longer_circle_is_found(tmp_path: Path) -> None:
    save(tmp_path, "a.toml", 'extends = "b.toml"')
    save(tmp_path, "b.toml", 'extends = "a.toml"')
    with pytest.raises(ConfigError, match=r"circle: .*a.toml -> .*b.toml -> .*a.toml"):
        load(tmp_path / "a.toml")


# --- overrides ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("links.loss=0.1", "links.loss", 0.1),
        ("nodes = 50", "nodes", 50),
        ("rule=mean", "rule", "mean"),
        ("rule=mean+variance.corrected", "rule", "mean+variance.corrected"),
        ("rule=['mean', {name = 'variance.corrected', target = 'own'}]", "rule",
         ("mean", {"name": "variance.corrected", "target": "own"})),
        ("timeline=['at 3 s: crash 10 %']", "timeline", ("at 3 s: crash 10 %",)),
        ("churn.trace_path=a=b.csv", "churn.trace_path", "a=b.csv"),
        ("data.options.hidden=[8,8]", "data.options", {"hidden": [8, 8]}),
        ("data.options.path=", "data.options", {"hidden": [32]}),
        ("data={alpha = 2.0}", "data.alpha", 2.0),
        ("links.encode=true", "links.encode", True),
        ("topology.degree=", "topology.degree", 4),
    ],
)  # fmt: skip
def test_an_override_sets_one_field(override: str, path: str, value: Any) -> None:
    found: Any = load("baseline", [override])[0]
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_act_in_order_and_an_empty_one_takes_the_default_back() -> None:
    assert load("thousand", ["seed=1", "seed=2"])[0].seed == 2
    assert load("thousand")[0].data.samples_per_node == 16
    assert load("thousand", ["data.samples_per_node="])[0].data.samples_per_node is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("links.los=1", "links.los: there is no such field; did you mean loss? (allowed: corruption, dial_timeout_s,"),
        ("lnks.loss=1", "lnks: there is no such field; did you mean links? (allowed: at_most_s, churn,"),
        ("zzz=1", "zzz: there is no such field (allowed: at_most_s, churn,"),
        ("seed.x=1", "seed: is a value, not a table (allowed: a whole number)"),
        ("devices.classes[0].share=1", "devices.classes[0]: there is no such field; did you mean classes?"),
        ("devices.classes.share=1", "devices.classes: is a value, not a table (allowed: a list of a table)"),
        ("links.loss", "--set: 'links.loss' is not field=value (allowed: links.loss=0.1)"),
        ("links..loss=1", "--set: 'links..loss=1' is not field=value"),
        ("=1", "--set: '=1' is not field=value"),
    ],
)  # fmt: skip
def test_an_override_of_nothing_is_refused(override: str, message: str) -> None:
    assert str(refused([override])).startswith(message)


# --- what is refused ------------------------------------------------------------------------------------
CLASSES = "[{name = 'a', share = 0.5}, {name = '%s', share = %s}]"


@pytest.mark.parametrize(
    ("overrides", "path", "problem", "allowed"),
    [
        (["links.latency_s=-1"], "links.latency_s", "expected `float` >= 0.0", "from 0 up to 60"),
        (["links.loss=1"], "links.loss", "expected `float` < 1.0", "from 0 below 1"),
        (["at_most_s=inf"], "at_most_s", "inf is no number", "above 0"),
        (["churn.mean_online_s=nan"], "churn.mean_online_s", "", "above 0"),
        (["nodes=abc"], "nodes", "expected `int`, got `str`", "a whole number from 1"),
        (["topology.kind=star"], "topology.kind", "'star' is not one of", "regular, ring, full, discover, file"),
        (["topology.degree=200"], "topology.degree", "<= 64", "from 1 up to 64"),
        (["nodes=4"], "topology.degree", "no connected graph of 4 nodes with 4 links", "2 to 3"),
        (["nodes=15", "topology.degree=5"], "topology.degree", "no connected graph", "2 to 14, even"),
        (["nodes=3000", "topology.kind=full"], "topology.kind", "3000 nodes", "full up to 2000 nodes"),
        (["topology.kind=file", "topology.path=none.csv"], "topology.path", "cannot be read", ""),
        (["devices.classes=[{name = 'a'}]"], "devices.classes[0].share", "must be given", "above 0 up to 1"),
        (["devices.classes=[{name = 'a', shar = 1}]"], "devices.classes[0].shar", "did you mean share", "name, share"),
        ([f"devices.classes={CLASSES % ('b', 0.4)}"], "devices.classes", "add up to 0.9", "1"),
        ([f"devices.classes={CLASSES % ('a', 0.5)}"], "devices.classes[1].name", "'a' is there already", ""),
        ([f"nat.classes={CLASSES % ('b', 0.4)}"], "nat.classes", "add up to 0.9", "1"),
        (["nat.table_path=none.txt"], "nat.table_path", "cannot read", ""),
        (["churn.model=trace", "churn.trace_path=none.csv"], "churn.trace_path", "cannot be read", ""),
        (["churn.night_share=1", "churn.day_s=5"], "churn.night_s", "leaves no day", "less than day_s"),
        (["links.latency=matrix"], "links.matrix_path", "must be given", ""),
        (["links.latency=matrix", "links.matrix_path=none.csv"], "links.matrix_path", "cannot read", ""),
        (["links.matrix_path=none.csv"], "links.matrix_path", "means nothing with latency 'constant'", "matrix"),
        (["links.latency_s=2"], "links.dial_timeout_s", "latency of 2 s", "more than 16"),
        (["timeline=['at 1 s: heal', 'at 2 s: bang']"], "timeline[1]", "no action 'bang'", "crash N %"),
        (["timeline=['at 2 h: heal']", "at_most_s=60"], "timeline[0]", "at 7200 s the run is over", "up to at_most_s, 60 s"),
        (["timeline=['at 2 s: crash nodes 100']"], "timeline[0]", "no nodes '100'", "0 to 99"),
        (["data.samples_per_node=9", "data.partitioner=shard"], "data.samples_per_node", "'shard'", "iid"),
        (["data.task=none.py:make_task"], "data.task", "there is no file", "my_task.py:make_task"),
        (["view.bootstrap=['/memory/0/p2p/x']"], "view.bootstrap", "not set here", "topology.kind"),
        (["view.static=true"], "view.static", "not set here", "topology.kind"),
        (["view.target_degree=9"], "view.target_degree", "not set here", "topology.degree"),
        (["view.max_degree=9"], "view.max_degree", "not set here", "topology.degree"),
        (["gossip.evaluate_every=9"], "gossip.evaluate_every", "not set here", "evaluation.every"),
        (["view.heartbeat_s=15"], "view.dead_after_s", "one lost heartbeat", "2 * heartbeat_s"),
        (["compute.device=gpu"], "compute.device", "'gpu' is no device", "cuda:0"),
        (["training.nesterov=true"], "training", "nesterov needs a momentum", ""),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_path(overrides: list[str], path: str, problem: str, allowed: str) -> None:
    error = refused(overrides)
    assert error.path == path
    assert problem in error.problem
    assert allowed in error.allowed
    assert bool(error.allowed) >= bool(allowed)


def test_a_wrong_rule_is_refused_where_torch_is_there() -> None:
    scenario, base = load("baseline", ["rule=meen"])
    validate(scenario, base)
    with pytest.raises(ConfigError, match=r"rule: .*'meen'; there are: mean"):
        validate_rule(scenario)
    validate_rule(load("baseline", ["rule=mean+variance.corrected"])[0])


# --- written and read again -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", BUILTIN)
def test_what_is_written_is_whole_and_reads_back_equal(name: str, tmp_path: Path) -> None:
    scenario, _ = load(name, ["rule=['mean', {name = 'variance.corrected'}]"])
    text = to_toml(scenario)
    assert load(save(tmp_path, "scenario.toml", text))[0] == scenario
    given = set(tomllib.loads(text))
    assert given == set(Scenario.__struct_fields__)


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        Scenario,
        name=st.text(),
        summary=st.text(),
        seed=st.integers(-(2**63), 2**63 - 1),
        timeline=st.lists(st.text()).map(tuple),
        data=st.builds(
            DataSettings,
            options=st.dictionaries(st.text(), st.text() | st.integers(0, 9) | st.lists(st.booleans())),
            alpha=st.floats(1e-9, 1e9),
            samples_per_node=st.none() | st.integers(1, 100),
        ),
    )
)
def test_any_text_and_number_survives_being_written(scenario: Scenario) -> None:
    assert convert(tomllib.loads(to_toml(scenario))) == scenario


# --- the page -------------------------------------------------------------------------------------------
def test_the_page_lists_the_fields_as_they_are() -> None:
    assert with_fields(PAGE) == PAGE, "run `python -m sim.scenario_files docs/scenarios.md`"


def test_every_field_has_its_place_and_ours_say_how_to_choose() -> None:
    listed = set(re.findall(r"^\| `([\w.\[\]]+)` \|", PAGE.partition("## Fields")[2], re.MULTILINE))
    assert len(listed) > 90
    described = [field for table in describe(Scenario, Scenario()) for field in table.fields]
    assert {field.path for field in described} == listed | set(OWNED)
    daemons = ("gossip.", "scalars.", "exchange.", "view.", "training.")
    silent = [f.path for f in described if not f.how_to_choose and not f.path.startswith(daemons)]
    assert silent == []
    assert [field.path for field in described if not field.allowed] == []


def test_a_field_is_described_from_its_struct() -> None:
    fields = {field.path: field for table in describe(Scenario, Scenario()) for field in table.fields}
    assert fields["gossip.rounds"].default == "40", "as in a scenario, not as in a daemon"
    assert fields["links.loss"].allowed == "a number from 0 below 1"
    assert fields["nodes"].allowed == "a whole number from 1 up to 1,000,000"
    assert fields["devices.classes[].share"].allowed == "a number above 0 up to 1"
    assert fields["devices.classes[].share"].default == ""
    assert fields["rule"].allowed == "text or a list of text or a table"
    assert fields["data.start"].how_to_choose.startswith("Whether nodes begin")


def test_every_example_line_of_the_page_can_be_read() -> None:
    (lines,) = re.findall(r"```timeline\n(.*?)```", PAGE, re.DOTALL)
    events = timeline.parse(lines.splitlines(), 10)
    assert len(events) == 8
    actions = re.findall(r"^\| `([a-z]+)` \|", PAGE.partition("## Trace")[0], re.MULTILINE)
    assert actions == [action.value for action in timeline.Action]
    assert ",".join(TRACE_COLUMNS) in PAGE


def test_the_example_scenario_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    validate(*load(save(tmp_path, "example.toml", text)))


def test_what_is_allowed_is_known_inside_lists_and_unions() -> None:
    assert field_docs.allowed_at(Scenario, "devices.classes[3].slowdown") == [
        "a number above 0 up to 1,000,000"
    ]
    assert field_docs.allowed_at(Scenario, "data.samples_per_node") == ["a whole number from 1"]
    assert field_docs.allowed_at(Scenario, "timeline[0]") == ["text"]
    assert field_docs.allowed_at(Scenario, "data.options.hidden[0]") == []
