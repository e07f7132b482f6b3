"""Train the EAGLE head of the local models, on text that the local model writes itself.

    python scripts/train_eagle.py --out results/eagle          # some 30 minutes on two cores
    python scripts/train_eagle.py --conversations 40 --epochs 1 --out /tmp/try   # a try

All local models are the dense one, function for function, so one head drafts for all of them. The
model makes its own prompts: given no more than "user:" and the first words of a question, it goes
on as a user would (the way of Magpie, arXiv 2406.08464). Then it answers, half of the time greedily
and half at temperature 0.8. The prompts of `moecascade bench` are never trained on: the share of
their answers' tokens that the head foresees is printed at the end.

The head is that of EAGLE (arXiv 2401.15077): one layer of the model's kind, which sees the model's
last hidden state and the token that was drawn from it. It begins as the model's own last layer. It
is trained on its own drafts too, `PASSES` deep, with the attention that it has while it drafts
(the way of HASS, arXiv 2408.15766).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody calls it
from torch import Tensor, nn

from moecascade import localmodel
from moecascade.evaluation.workloads import TASKS, own
from moecascade.localmodel.packed import pack, unpack

PASSES = 3  # how many of its own tokens deep the head is trained to draft
DEEPER = 0.7  # what a pass weighs in the loss, of the pass before
FEATURE = 0.1  # what coming near the model's hidden state weighs beside its distribution
VOCABULARY = 8192  # tokens that the loss tells apart, the most frequent
LONGEST = 320  # tokens of a conversation
ANSWER = 128
BATCH = 8  # conversations
RATE = 1e-3

STEMS = {
    "code": (
        "Write a Python function that",
        "Here is a Python function:\n\n```python\ndef",
        "Add docstrings to this code and return the whole file.\n\n```python\n",
        "Rename the variable in this code and return all of it.\n\n```python\nclass",
        "Fix the bug in this Python code:\n\n```python\n",
        "Rewrite this function so that it",
        "Write a class in Python for",
        "Add type hints to this function:\n\n```python\ndef",
        "Write unit tests for this function:\n\n```python\ndef",
        "Write a SQL query that",
        "Write a small HTML page with",
        "Convert this JSON to",
    ),
    "math": (
        "A train",
        "A shop sells",
        "How many",
        "Anna has",
        "A farmer",
        "There are 24 students in a class.",
        "If a car travels",
        "Tom buys 3",
        "A box holds",
        "What is the sum of",
        "A recipe needs",
        "Explain step by step:",
    ),
    "extraction": (
        "List every person in this text with their job.\n\nText:",
        "Return a JSON object with name, date and place.\n\nThe",
        "Extract all dates from the following text:\n\n",
        "Read the message and list phone numbers and names.\n\nHello,",
        "Find every company in this article:\n\n",
        "Summarise in one line each:\n\n1.",
        "Make a table of the products and prices in this text.\n\nWe sell",
        "Who, when, where? Answer from this text:\n\nOn Monday,",
        "Copy the sentences that name a city:\n\n",
        "Turn this invoice into JSON.\n\nInvoice",
    ),
    "chat": ("", "", "", "What is", "Explain", "Tell me about", "Write a short story about", "Why"),
}


@dataclass(frozen=True, slots=True)
class Text:
    """A conversation: its tokens, and where the user's turn and the answer begin."""

    tokens: list[int]
    user: int
    answer: int


def say(what: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# ---- text ----------------------------------------------------------------------------------------


def write_text(model: Path, conversations: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Let the model write what to train on, and its answers to the prompts of `bench`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=128,
        seed=seed,
        disable_log_stats=True,
    )
    tokenizer = llm.get_tokenizer()
    end = tokenizer.eos_token_id

    def chat(prompt: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])

    mark = "\x00"
    before = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False
    ).partition(mark)[0]
    draw = random.Random(seed)  # noqa: S311
    stems = [draw.choice(STEMS[task]) for task in draw.choices(list(STEMS), k=conversations)]
    opened = [tokenizer(before + stem)["input_ids"] for stem in stems]
    user = len(tokenizer(before)["input_ids"])

    def generate(asked: Sequence[list[int]], params: Sequence[Any]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": tokens} for tokens in asked]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    say(f"{conversations} users ask")
    params = [SamplingParams(temperature=0.8, max_tokens=64, stop_token_ids=[end])] * len(opened)
    said = generate(opened, params)
    prompts = [
        tokenizer.decode([*head[user:], *rest], skip_special_tokens=True)
        for head, rest in zip(opened, said, strict=True)
    ]
    prompts = list(dict.fromkeys(prompt for prompt in prompts if len(prompt) > 12))

    def answered(prompts: Sequence[str], temperatures: Sequence[float]) -> list[Text]:
        asked = [chat(prompt) for prompt in prompts]
        params = [
            SamplingParams(temperature=temperature, max_tokens=ANSWER)
            for temperature in temperatures
        ]
        answers = generate(asked, params)
        return [
            Text([*head, *rest], user, len(head)) for head, rest in zip(asked, answers, strict=True)
        ]

    say(f"{len(prompts)} answers")
    began = time.monotonic()
    texts = answered(prompts, [0.8 * (i % 2) for i in range(len(prompts))])
    many = sum(len(text.tokens) - text.answer for text in texts)
    say(f"{many} tokens, {many / (time.monotonic() - began):.0f} a second")
    say("answers to the prompts held out")
    held_out = [prompt.prompt for task in TASKS for prompt in own(task)]
    return texts, answered(held_out, [0.0] * len(held_out))


def kept(path: Path, model: Path, conversations: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Return the text in a file, written first where there is none."""
    if not path.exists():
        both = write_text(model, conversations, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [[[t.tokens, t.user, t.answer] for t in texts] for texts in both]
        path.write_text(json.dumps(made))
    texts, held_out = ([Text(*t) for t in texts] for texts in json.loads(path.read_text()))
    return texts, held_out


# ---- the head ------------------------------------------------------------------------------------


class Head(nn.Module):
    """A decoder layer without its first norm, behind a projection of token and hidden state.

    Args:
        model: The dense model; the head begins as its last layer.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        width = model.config.hidden_size
        last = model.model.layers[-1]
        self.heads = model.config.num_attention_heads
        self.kv_heads = model.config.num_key_value_heads
        self.fc = nn.Linear(2 * width, width, bias=False)
        loud = model.model.norm.weight.detach().float().square().mean().sqrt()  # hidden states
        quiet = model.model.embed_tokens.weight.detach().float().square().mean().sqrt()
        with torch.no_grad():
            half = torch.eye(width) / 2
            self.fc.weight.copy_(torch.cat([half * loud / quiet, half], 1))
        scale = last.input_layernorm.weight.detach().float() / loud
        self.projections = nn.ModuleDict()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self._copy(name, getattr(last.self_attn, name), None if name == "o_proj" else scale)
        for name in ("gate_proj", "up_proj", "down_proj"):
            self._copy(name, getattr(last.mlp, name), None)
        self.norm = nn.Parameter(last.post_attention_layernorm.weight.detach().float().clone())
        self.eps = model.config.rms_norm_eps
        rope = model.config.rope_parameters["rope_theta"]
        size = model.config.head_dim
        self.register_buffer("turns", rope ** (-torch.arange(0, size, 2).float() / size))

    def _copy(self, name: str, of: Any, scale: Tensor | None) -> None:
        weight = of.weight.detach().float()
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight.clone() if scale is None else weight * scale)
        self.projections[name] = made

    def _rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.turns
        cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def forward(
        self, embedded: Tensor, hidden: Tensor, earlier: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return what comes out at each place, [batch, length, width].

        Args:
            embedded: The tokens drawn, [batch, length, width].
            hidden: The hidden states that they were drawn from; in a later pass the head's own.
            earlier: Keys and values of the passes before; this pass's are added. Where a token is
                the n-th of a draft, the text before is seen as the first pass had it, and the
                draft's tokens as their passes had them.
        """
        p = self.projections
        x = self.fc(torch.cat([embedded, hidden], -1))
        q = self._rotated(self._split(p["q_proj"](x), self.heads))
        k = self._rotated(self._split(p["k_proj"](x), self.kv_heads))
        v = self._split(p["v_proj"](x), self.kv_heads)
        repeat = self.heads // self.kv_heads
        earlier.append((k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
        length = x.shape[1]
        deep = len(earlier) - 1
        scale = q.shape[-1] ** -0.5
        text_k, text_v = earlier[0]
        scores = [q @ text_k.transpose(-1, -2) * scale]
        places = torch.arange(length)
        seen = places[None, :] <= places[:, None] - deep
        scores[0] = scores[0].masked_fill(~seen, -math.inf)
        values = [(text_v, 0)]
        for i, (own_k, own_v) in enumerate(earlier[1:], 1):
            back = deep - i  # of the i-th pass the query sees the key so many places back
            scores.append((q * own_k.roll(back, 2)).sum(-1, keepdim=True) * scale)
            values.append((own_v.roll(back, 2), 1))
        weights = torch.softmax(torch.cat(scores, -1).float(), -1).to(q.dtype)
        out = weights[..., :length].nan_to_num() @ values[0][0]
        for i, (own_v, _) in enumerate(values[1:]):
            out = out + weights[..., length + i : length + i + 1] * own_v
        x = x + p["o_proj"](out.transpose(1, 2).flatten(-2))
        normed = F.rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), self.eps)
        return x + p["down_proj"](F.silu(p["gate_proj"](normed)) * p["up_proj"](normed))

    def weights(self) -> dict[str, Tensor]:
        """Return the weights under the names of EAGLE's checkpoints."""
        made = {"fc.weight": self.fc.weight, "layers.0.post_attention_layernorm.weight": self.norm}
        for name, linear in self.projections.items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            made[f"layers.0.{part}.{name}.weight"] = linear.weight
        return {name: weight.detach() for name, weight in made.items()}

    def take(self, weights: dict[str, Tensor]) -> None:
        """Take the values of weights under these names."""
        with torch.no_grad():
            for name, weight in self.weights().items():
                weight.copy_(weights[name])


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations of like length, padded behind.

    Attributes:
        tokens: Token ids, [batch, length].
        hidden: The model's last hidden states, after its norm, [batch, length, width].
        counts: Whether a place's hidden state is to be foreseen, [batch, length].
    """

    tokens: Tensor
    hidden: Tensor
    counts: Tensor


def batches(model: Any, texts: Sequence[Text], start: str) -> list[Batch]:
    """Return texts with the model's hidden states; what is before `start` is not learnt."""
    made = []
    ordered = sorted(texts, key=lambda text: len(text.tokens))
    for at in range(0, len(ordered), BATCH):
        some = ordered[at : at + BATCH]
        length = min(LONGEST, max(len(text.tokens) for text in some))
        tokens = torch.zeros(len(some), length, dtype=torch.long)
        counts = torch.zeros(len(some), length, dtype=torch.bool)
        for row, text in enumerate(some):
            n = min(length, len(text.tokens))
            tokens[row, :n] = torch.tensor(text.tokens[:n])
            counts[row, getattr(text, start) - 1 : n] = True
        with torch.inference_mode():
            hidden = model.model(tokens).last_hidden_state
        made.append(Batch(tokens, hidden.clone(), counts))
    return made


def passes(
    head: Head, embed: nn.Embedding, batch: Batch, many: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield what each pass foresees at a place, the next hidden state, and where that counts."""
    embedded = embed(batch.tokens[:, 1:]).float()
    hidden = batch.hidden[:, :-1].float()
    counts = batch.counts[:, 1:]
    earlier: list[tuple[Tensor, Tensor]] = []
    for deep in range(many):
        with torch.autocast("cpu", torch.bfloat16):
            out = head(embedded, hidden, earlier).float()
        here = counts.clone()
        here[:, :deep] = False
        yield out, here
        hidden = out.roll(1, 1)


def loss(head: Head, model: Any, rows: Tensor, batch: Batch, many: int) -> Tensor:
    """Return how far the head is from the model: distribution and hidden state, each pass."""
    total = torch.zeros(())
    for deep, (out, counts) in enumerate(passes(head, model.model.embed_tokens, batch, many)):
        truth = batch.hidden[:, 1:][counts].float()
        found = out[counts]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = torch.softmax((truth @ rows.T).float(), -1)
            logits = found @ rows.T
        distribution = -(wanted * torch.log_softmax(logits.float(), -1)).sum(-1).mean()
        total = total + DEEPER**deep * (distribution + FEATURE * F.smooth_l1_loss(found, truth))
    return total


def foreseen(head: Head, model: Any, held_out: Sequence[Batch]) -> list[float]:
    """Return the share of tokens that the head foresees, of those right up to then, by place."""
    right, asked = [0] * PASSES, [0] * PASSES
    with torch.inference_mode():
        for batch in held_out:
            best = torch.zeros_like(batch.tokens[:, 1:])
            drafted = best.clone()
            learnt = batch.counts[:, 1:]
            best[learnt] = model.lm_head(batch.hidden[:, 1:][learnt]).argmax(-1)
            good = torch.ones_like(learnt)
            made = passes(head, model.model.embed_tokens, batch, PASSES)
            for deep, (out, counts) in enumerate(made):
                if deep:  # the tokens before, of the same draft
                    good = good.roll(1, 1)
                asked[deep] += int((counts & good).sum())
                asked_for = counts & good
                found = out[asked_for].to(batch.hidden.dtype)
                drafted[asked_for] = model.lm_head(found).argmax(-1)
                good = good & (drafted == best)
                right[deep] += int((counts & good).sum())
    return [r / max(1, n) for r, n in zip(right, asked, strict=True)]


def train(
    head: Head,
    model: Any,
    texts: Sequence[Batch],
    held_out: Sequence[Batch],
    epochs: int,
    seed: int,
) -> None:
    """Train the head."""
    count = Counter(token for batch in texts for token in batch.tokens.flatten().tolist())
    frequent = sorted(token for token, _ in count.most_common(VOCABULARY))
    rows = model.lm_head.weight.detach()[frequent]
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    steps = epochs * len(texts)
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm) * (0.05 + 0.95 * math.cos(math.pi / 2 * step / steps))
        ),
    )
    draw = random.Random(seed)  # noqa: S311
    began = time.monotonic()
    step, recent = 0, 0.0
    for epoch in range(epochs):
        many = PASSES if epoch >= epochs // 2 else 1  # first what is first
        for i in draw.sample(range(len(texts)), len(texts)):
            optimizer.zero_grad()
            found = loss(head, model, rows, texts[i], many)
            found.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            recent = found.item() if step == 1 else 0.98 * recent + 0.02 * found.item()
            if step % 50 == 0:
                left = (time.monotonic() - began) / step * (steps - step)
                say(f"step {step} of {steps}, loss {recent:.3f}, {left / 60:.0f} minutes left")
        shares = ", ".join(f"{share:.1%}" for share in foreseen(head, model, held_out))
        say(f"epoch {epoch + 1} of {epochs}: foreseen of the answers held out: {shares}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/eagle"))
    parser.add_argument("--conversations", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    place = localmodel.ensure("dense", progress=say)
    texts, held_out = kept(asked.out / "text.json", place, asked.conversations, asked.seed)
    torch.manual_seed(asked.seed)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
    model.requires_grad_(requires_grad=False)
    say("the model reads it")
    known = batches(model, texts, "user")
    unknown = batches(model, held_out, "answer")
    say(f"{sum(int(batch.counts.sum()) for batch in known)} tokens to learn from")
    head = Head(model)
    shares = foreseen(head, model, unknown)
    say("before: " + ", ".join(f"{share:.1%}" for share in shares))
    train(head, model, known, unknown, asked.epochs, asked.seed)
    packed = pack(head.weights())
    head.take(unpack(packed))
    shares = foreseen(head, model, unknown)
    about = {
        "trained on": f"{len(texts)} conversations that the local model wrote, seed {asked.seed}",
        "command": f"python scripts/train_eagle.py --conversations {asked.conversations} "
        f"--epochs {asked.epochs} --seed {asked.seed}",
        "foreseen": ", ".join(f"{share:.3f}" for share in shares),
    }
    file = asked.out / "eagle.safetensors"
    save_file(packed, file, metadata={"format": "pt", **about})
    say(f"{file}, after {(time.monotonic() - began) / 60:.0f} minutes")
    print("Greedy answers to bench's prompts, foreseen by place:", about["foreseen"])


if __name__ == "__main__":
    main()
