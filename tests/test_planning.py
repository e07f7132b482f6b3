"""The planner: parameters by hand and as published, limits, monotony, and what the command says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.errors import ConfigError
from moecascade.replay.planning import devices, plan, validation
from moecascade.replay.planning.architecture import ARCHITECTURES, Model, parse
from moecascade.replay.planning.step_time import (
    Drafter,
    Setup,
    drafting_time,
    head_of,
    imbalance,
    step_time,
    unique_experts,
    with_drafting,
)
from tests.conftest import Answer

SMALL = {
    "model_type": "mixtral",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
H100 = Setup(devices.find("H100"))


def small(**changes: object) -> Model:
    return parse("small", {**SMALL, **changes})


def test_a_small_mixture_of_experts_counted_by_hand() -> None:
    model = small()
    (layer, other) = model.layers
    assert layer == other
    # Queries and output 8 x 8, keys and values 8 x 4, two norms of 8.
    assert layer.attention == 64 + 32 + 32 + 64 + 16
    assert layer.kv == 8
    assert layer.dense == 8 * 4  # the router
    assert layer.expert == 3 * 8 * 16
    assert (layer.experts, layer.top_k) == (4, 2)
    # Embedding and output matrix 10 x 8 each, a norm at the end.
    assert model.total == 2 * (208 + 32 + 4 * 384) + 160 + 8
    assert model.active == 2 * (208 + 32 + 2 * 384) + 80
    assert small(tie_word_embeddings=True).total == model.total - 80


# Llama 4 is published with its vision part.
@pytest.mark.parametrize(
    "name", [n for n in plan.known_models() if "Llama-4" not in n and plan.published(n)]
)
def test_parameters_are_those_that_are_published(name: str) -> None:
    assert plan.find_model(name).total / 1e9 == pytest.approx(plan.published(name), rel=0.01)


@pytest.mark.parametrize(
    ("name", "active"),
    [("mistralai/Mixtral-8x7B-v0.1", 12.9), ("openai/gpt-oss-120b", 5.1), ("Qwen3-30B-A3B", 3.3)],
)
def test_active_parameters_with_the_embedding(name: str, active: float) -> None:
    model = plan.find_model(name)
    both = model.active + (0 if "gpt" in name else model.head)
    assert both / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_says_which_keys_it_lacks(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"hidden_size.*num_attention_heads"):
        parse("m", {"model_type": kind})


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mixtrall' is not known.*did you mean 'mixtral'"):
        small(model_type="mixtrall")
    with pytest.raises(ConfigError, match="another kind"):
        small(hidden_size="wide")
    with pytest.raises(ConfigError, match="has no num_local_experts"):
        small(num_local_experts=None)


@given(st.integers(1, 64), st.integers(0, 16), st.floats(0, 0.9))
def test_experts_read_lie_between_one_tokens_and_all(n: int, k: int, affinity: float) -> None:
    (layer, _) = small(num_local_experts=16).layers
    read = unique_experts(layer, n, k, affinity)
    assert layer.top_k - 1e-9 <= read <= layer.experts
    assert read <= unique_experts(layer, n, k, 0.0) + 1e-9
    assert read <= unique_experts(layer, n, k + 1, affinity) + 1e-9
    assert read <= unique_experts(layer, n + 1, k, affinity) + 1e-9


def test_a_model_whose_tokens_use_all_experts_is_a_dense_one() -> None:
    (layer, _) = small(num_experts_per_tok=4).layers
    assert unique_experts(layer, 1, 0, 0.2) == 4.0
    assert unique_experts(layer, 8, 8, 0.2) == 4.0


@given(
    st.sampled_from([n for n in plan.known_models() if "70B" not in n]),
    st.integers(1, 64),
    st.integers(0, 12),
    st.integers(0, 8192),
)
def test_more_drafts_requests_and_text_never_take_less_time(
    name: str, n: int, k: int, context: int
) -> None:
    model = plan.find_model(name)

    def took(**more: int) -> float:
        return step_time(model, H100, **{"requests": n, "k": k, "context": context, **more}).total

    now = took() * (1 + 1e-9)
    assert took(k=k + 1) >= took() / (1 + 0.02)  # tiles: a few rows more may fill one better
    assert took(requests=n + 1) * 1.02 >= took()
    assert took(context=context + 100) <= took() * 2
    assert took(context=context + 100) * (1 + 1e-9) >= took() <= now


def test_a_faster_device_and_fewer_bits_never_take_longer() -> None:
    model = plan.find_model("Mixtral-8x7B-v0.1")
    slow = step_time(model, Setup(devices.find("A100-80GB"))).total
    assert step_time(model, H100).total < slow
    assert step_time(model, replace(H100, bits=8)).total < step_time(model, H100).total


def test_drafts_cost_an_moe_and_hardly_a_dense_model_and_less_in_a_batch() -> None:
    """The hump: dear where few experts are read, cheap where all are, dear again where computed."""

    def cost(name: str, n: int, k: int = 4) -> float:
        model = plan.find_model(name)
        with_k, without = (step_time(model, H100, requests=n, k=at).total for at in (k, 0))
        return with_k / without

    assert cost("Llama-3.1-8B-Instruct", 1) < 1.2
    assert cost("Mixtral-8x7B-v0.1", 1) > 1.8
    assert cost("Qwen2-57B-A14B", 32) < 1.3 < cost("Qwen2-57B-A14B", 1)
    assert cost("Qwen2-57B-A14B", 512) > 1.5


def test_cards_divide_what_is_read_and_add_exchanges() -> None:
    model = plan.find_model("Mixtral-8x7B-v0.1")
    one, two = (step_time(model, replace(H100, cards=cards)) for cards in (1, 2))
    assert two.experts == pytest.approx(one.experts / 2)
    assert two.network > one.network == 0.0
    apart = step_time(model, replace(H100, cards=2, expert_parallel=True))
    assert apart.experts > two.experts


def test_the_fullest_card_reads_more_but_never_all() -> None:
    assert imbalance(10, 1) == 1.0
    assert 1.0 < imbalance(1000, 8) < 1.2 < imbalance(16, 8) <= 8


def test_what_drafting_takes() -> None:
    model = plan.find_model("Qwen3-30B-A3B")
    head = Drafter("eagle3", head_of(model, method="eagle3"))
    load = {"requests": 1, "context": 512}
    none, one, four = (drafting_time(head, H100, k=k, **load) for k in (0, 1, 4))
    assert none == one > 0
    assert four == pytest.approx(4 * one)
    assert drafting_time(Drafter("ngram"), H100, k=4, **load) == 0.0
    whole = with_drafting(model, H100, head, k=4, **load)
    assert whole.total == pytest.approx(step_time(model, H100, k=4, **load).total + four)
    mtp = head_of(model, method="mtp").layers[0]
    assert mtp.experts == 128
    assert head_of(model, method="eagle").vocabulary == model.vocabulary


@given(st.integers(1, 10), st.floats(1.001, 8.0))
def test_at_break_even_tokens_are_worth_what_they_cost(k: int, cost: float) -> None:
    chance = plan.break_even(k, cost)
    if cost >= k + 1:
        assert chance is None
    else:
        assert chance is not None
        assert sum(chance**j for j in range(k + 1)) == pytest.approx(cost, rel=1e-6)
    assert plan.break_even(k, 0.9) == 0.0


def test_published_costs_are_met() -> None:
    """What checks: median within 15%, none off by more than 40%, 9 of 10 signs. What fits: 5%."""
    points = validation.published()
    fits = [point for point in points if point.fits and point.overlap]
    assert validation.typical(validation.errors(fits)) < 0.05
    assert max(map(abs, validation.errors(fits))) < 0.2
    checks = [point for point in points if not point.fits]
    assert len(points) >= 80
    assert len(checks) >= 50
    assert len({point.source for point in points}) >= 15
    assert not {p.source for p in points if p.fits} & {p.source for p in checks}
    found, right = validation.errors(checks), validation.signs(checks)
    assert validation.typical(found) <= 0.15
    assert max(map(abs, found)) <= 0.4
    assert sum(right) >= 0.9 * len(right)
    for point in points:
        assert point.source
        assert point.how
        assert point.cost > 1.0


def test_devices_are_known_by_what_drivers_call_them(tmp_path: Path) -> None:
    assert devices.find("NVIDIA H100 80GB HBM3").name == devices.find("h100").name == "H100-SXM"
    assert len([name for name in devices.names() if not devices.find(name).cpu]) >= 15
    assert len([name for name in devices.names() if devices.find(name).cpu]) >= 2
    assert all(devices.find(name).source for name in devices.names())
    with pytest.raises(ConfigError, match=r"unknown device 'H1000'.*H100"):
        devices.find("H1000")
    file = tmp_path / "mine.json"
    values = {"memory_gb": 8, "bandwidth_gbps": 100, "bf16_tflops": 10, "link_gbps": 8}
    file.write_text(json.dumps(values))
    assert devices.find(str(file)).bandwidth_gbps == 100
    file.write_text(json.dumps({**values, "bandwidth": 3}))
    with pytest.raises(ConfigError, match="did you mean 'bandwidth_gbps'"):
        devices.find(str(file))
    file.write_text(json.dumps({**values, "link_gbps": 0}))
    with pytest.raises(ConfigError, match="link_gbps must be above 0"):
        devices.find(str(file))


def test_the_command_answers_at_once_on_the_core_s_dependencies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    script = (
        "import sys; sys.argv = ['moecascade', 'plan', sys.argv[1], '--device', 'H100', '--json']\n"
        "from moecascade.cli import app\n"
        "try:\n    app.run()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == small().total
    assert {(c["requests"], c["k"]) for c in found["choices"]} == {
        (n, k) for n in (1, 4, 16, 64) for k in range(9)
    }


def test_tables_fit_80_columns(cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.conftest.COLUMNS", 80)
    shown = cli(
        *("plan", "Qwen3-30B-A3B", "--device", "H100", "--tensor-parallel", 2),
        *("--drafter", "mtp", "--max-k", 8, "--concurrency", "1,256"),
    )
    assert shown.returncode == 0
    assert "\u2026" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "moecascade serve Qwen/Qwen3-30B-A3B" in shown.stdout


def test_the_plot_is_drawn_where_asked_for(cli: Callable[..., Answer], tmp_path: Path) -> None:
    file = tmp_path / "new" / "plan.svg"
    asked = ("plan", "Qwen3-30B-A3B", "--device", "H100", "--drafter", "eagle3", "--plot")
    assert cli(*asked, file).returncode == 0
    drawn = file.read_text()
    for word in ("costs, 64 at once", "chat, EAGLE-3", "experts", "K=8", "Qwen3-30B-A3B on H100"):
        assert word in drawn
    answer = cli(*asked, tmp_path / "plan.doc")
    assert answer.returncode == 2
    assert "plan.doc: cannot be written" in answer.stderr


@pytest.mark.parametrize("profile", plan.profiles_for("ngram"), ids=lambda profile: profile.name)
def test_a_fixed_k_gains_where_its_drafts_give_more_than_they_cost(profile: plan.Profile) -> None:
    """The two ways to see it agree: all steps' speed-up, and the tokens of a step with a draft."""
    setup = Setup(devices.find("RTX-6000-Ada"), bits=8.0)
    model = plan.find_model("Mixtral-8x7B-v0.1")
    drafter = plan.find_drafter("ngram", model)
    found = plan.choices(model, setup, drafter, requests=(1, 4), profiles=[profile])
    seen = set()
    for choice in found:
        gain, tokens = choice.speedups[profile.name], profile.tokens_of_a_draft(choice.k)
        if choice.k and gain is not None and tokens is not None:
            assert (gain > 1.0) == (tokens > choice.cost)
            seen.add(gain > 1.0)
    assert any(seen)  # it pays somewhere


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["Mixtral-8x7B-v0.2", "--device", "H100"], "Mixtral-8x7B-v0.1"),
        (["Mixtral-8x7B-v0.1", "--device", "H10"], "H100"),
        (["Mixtral-8x7B-v0.1", "--device", "H100", "--drafter", "eagle4"], "eagle"),
        (["Mixtral-8x7B-v0.1", "--device", "H100", "--drafter", "draft_model"], "say which"),
        (["Mixtral-8x7B-v0.1", "--device", "H100", "--dtype", "fp9"], "fp8"),
        (["Mixtral-8x7B-v0.1", "--device", "H100", "--concurrency", "0"], "at least 1"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_name(
    wrong: list[str], said: str, cli: Callable[..., Answer]
) -> None:
    shown = cli("plan", *wrong)
    assert (shown.returncode, said in shown.stderr) == (2, True), shown.stderr
