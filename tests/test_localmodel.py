"""The local models write the dense model's text, and are only ever found whole."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from moecascade import localmodel
from moecascade.errors import ConfigError, SetupError
from moecascade.localmodel import build
from moecascade.localmodel.catalogue import LocalModel
from moecascade.localmodel.upcycle import config_of, upcycle

SMALL = {
    "mixtral": LocalModel("m", "mixtral", "", experts=4, top_k=2),
    "qwen": LocalModel("q", "qwen", "", experts=12, top_k=4, expert_width=16),
    "truncated": LocalModel("t", "truncated", "", layers=1),
}


@pytest.fixture(scope="module")
def dense() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def weights_of(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}


def rebuilt(model: LocalModel, dense: Any, folder: Path) -> Any:
    """Return the upcycled model as transformers loads it from disk."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = config_of(model, dense.config)
    config.save_pretrained(folder)
    save_file(upcycle(model, weights_of(dense)), folder / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] - {"lm_head.weight"}
    assert not info["unexpected_keys"]
    return loaded.eval()


def tokens() -> Any:
    import torch

    return torch.randint(0, 128, (4, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("style", ["mixtral", "qwen"])
def test_upcycling_preserves_the_function(style: str, dense: Any, tmp_path: Path) -> None:
    import torch

    with torch.inference_mode():
        moe = rebuilt(SMALL[style], dense, tmp_path)
        expected, found = dense(tokens()).logits, moe(tokens()).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 2e-4 * scale
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_a_broken_expert_shows(dense: Any, tmp_path: Path) -> None:
    """The check above can fail: one expert changed in one layer, and the logits move."""
    import torch

    with torch.inference_mode():
        moe = rebuilt(SMALL["mixtral"], dense, tmp_path)
        moe.model.layers[1].mlp.experts.down_proj[2] *= 1.5
        difference = (moe(tokens()).logits - dense(tokens()).logits).abs().max()
    assert difference > 0.01 * dense(tokens()).logits.abs().max()


@pytest.mark.parametrize("style", ["mixtral", "qwen"])
def test_tokens_are_spread_over_experts_with_memory_of_their_own(style: str, dense: Any) -> None:
    import torch

    model = SMALL[style]
    weights = upcycle(model, weights_of(dense))
    experts = [name for name in weights if ".experts." in name]
    assert len(experts) == 3 * 3 * model.experts  # layers, matrices
    assert len({weights[name].data_ptr() for name in experts}) == len(experts)
    (router,) = (
        w for name, w in weights.items() if ".1." in name and name.endswith(".gate.weight")
    )
    hidden = torch.randn(2000, 48, generator=torch.Generator().manual_seed(3))
    chosen = (hidden @ router.T).topk(model.top_k).indices
    share = torch.bincount(chosen.flatten(), minlength=model.experts) / len(hidden)
    assert share.min() > 0.3 * model.top_k / model.experts
    assert upcycle(model, weights_of(dense))[experts[0]].equal(weights[experts[0]])  # by the seed


def test_the_drafter_is_the_first_layers(dense: Any) -> None:
    weights = upcycle(SMALL["truncated"], weights_of(dense))
    assert config_of(SMALL["truncated"], dense.config).num_hidden_layers == 1
    assert {n for n in weights if "layers" in n} == {n for n in weights if "layers.0." in n}


def test_the_default_local_model_is_there_and_verified() -> None:
    folder = localmodel.ensure("local")
    record = json.loads((folder / build.RECORD).read_text())
    assert record["verified"] is True
    assert record["parameters"] > 6e8
    assert json.loads((folder / "config.json").read_text())["num_local_experts"] == 8


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch, dense: Any) -> None:
    """Build from the small random model, so that a build takes no time."""

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    source = (dense.config, Tokenizer(), weights_of(dense))
    monkeypatch.setattr(build, "_load_dense", lambda: source)
    monkeypatch.setattr(build, "_verify", lambda *_: None)


def test_an_interrupted_build_leaves_nothing_that_counts(
    tmp_path: Path, instant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            localmodel.ensure("local", cache=tmp_path)
    assert localmodel.state("local", tmp_path) is None
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    # a killed build cannot clean up; the next one does
    (tmp_path / "mixtral-8-v1.partial").mkdir()
    (tmp_path / "mixtral-8-v1.partial" / "rubbish").touch()
    folder = localmodel.ensure("local", cache=tmp_path)
    assert not (folder / "rubbish").exists()
    assert not (tmp_path / "mixtral-8-v1.partial").exists()


def test_a_model_that_fails_verification_is_not_kept(
    tmp_path: Path, instant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise SetupError("other text")

    monkeypatch.setattr(build, "_verify", wrong)
    with pytest.raises(SetupError):
        localmodel.ensure("qwen-moe", cache=tmp_path)
    assert localmodel.state("qwen-moe", tmp_path) is None


def test_a_model_that_is_replaced_never_counts_without_its_weights(
    tmp_path: Path, instant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = localmodel.ensure("local", cache=tmp_path)
    remove = shutil.rmtree

    def killed(folder: Path, **options: Any) -> None:
        if (folder / build.WEIGHTS).exists():
            (folder / build.WEIGHTS).unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            localmodel.ensure("local", cache=tmp_path, force=True)
    assert (place / build.WEIGHTS).exists() == (place / build.RECORD).exists()
    localmodel.ensure("local", cache=tmp_path, force=True)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [place.name]


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(
    tmp_path: Path, instant: None
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"file.*MOECASCADE_CACHE"):
        localmodel.ensure("local", cache=tmp_path / "file")


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, instant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SetupError, match="No space left"):
        localmodel.ensure("local", cache=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_others_may_read_the_weights(tmp_path: Path, instant: None) -> None:
    folder = localmodel.ensure("local", cache=tmp_path)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_two_builds_at_once_make_one_model(
    tmp_path: Path, instant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    build_once = build._build

    def counted(*arguments: Any) -> None:
        builds.append(1)
        build_once(*arguments)

    monkeypatch.setattr(build, "_build", counted)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(localmodel.ensure("local", cache=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len(builds) == 1


def test_what_is_built_is_used_again(tmp_path: Path, instant: None) -> None:
    folder = localmodel.ensure("draft", cache=tmp_path)
    before = (folder / build.RECORD).stat().st_mtime_ns
    assert localmodel.ensure("draft", cache=tmp_path) == folder
    assert (folder / build.RECORD).stat().st_mtime_ns == before
    localmodel.ensure("draft", cache=tmp_path, force=True)
    assert (folder / build.RECORD).stat().st_mtime_ns > before


def test_unknown_names_and_the_cache_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"'mixtral-9'.*did you mean 'mixtral-8'"):
        localmodel.ensure("mixtral-9")
    monkeypatch.setenv("MOECASCADE_CACHE", str(tmp_path))
    assert localmodel.path_of("local") == tmp_path / "mixtral-8-v1"


def test_packed_weights_are_the_weights_within_half_a_step() -> None:
    import torch

    from moecascade.localmodel.packed import GROUP, SCALE, pack, unpack

    random = torch.Generator().manual_seed(0)
    loud = torch.randn(3, GROUP, generator=random) * 100
    quiet = torch.randn(3, GROUP, generator=random) / 100
    weights = {"both": torch.cat([loud, quiet], 1), "norm": torch.ones(5), "none": 0 * quiet}
    packed = pack(weights)
    assert packed["both"].dtype == torch.int8
    assert packed["both" + SCALE].shape == (3, 2)
    back = unpack(packed)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        groups = weight.unflatten(-1, (-1, GROUP)) if weight.dim() > 1 else weight[None, None]
        step = groups.abs().amax(-1, keepdim=True) / 127 if weight.dim() > 1 else 0.0
        error = (back[name].float() - weight).reshape(groups.shape).abs()
        assert (error <= 0.6 * step + 0.005 * groups.abs()).all(), name


def test_the_eagle_head_says_where_it_comes_from_and_suits_all_local_models(tmp_path: Path) -> None:
    from importlib import resources

    from safetensors import safe_open

    from moecascade.localmodel.catalogue import CATALOGUE, EAGLE

    folder = localmodel.ensure("eagle", cache=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 576)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("fc.weight").get_shape() == [576, 2 * 576]
        names = list(file.keys())
        assert not [name for name in names if "embed" in name or "lm_head" in name]
    with (
        resources.as_file(resources.files(localmodel) / EAGLE) as path,
        safe_open(path, "pt") as file,
    ):
        about = file.metadata()
    assert "scripts/train_eagle.py" in about["command"]
    assert float(about["foreseen"].split(",")[0]) >= 0.45
    assert [name for name, model in CATALOGUE.items() if model.drafts] == ["draft", "eagle"]
