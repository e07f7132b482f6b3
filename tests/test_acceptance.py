"""The judges: what they say of a draft, by its text and by how the last ones fared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.marginal import predictor
from moecascade.core.marginal.acceptance import PLACES, Record, TextJudge
from moecascade.core.marginal.judge import LONGEST
from moecascade.core.marginal.predictor import BEGINS, BUCKETS, LONGEST_MATCH, SLOTS
from moecascade.core.marginal.recent import RecentJudge
from moecascade.core.step import RequestStep

texts = st.lists(st.integers(0, 3), min_size=2, max_size=80)


def begun(judge: TextJudge, text: Sequence[int]) -> Record:
    """Return the record of a request "r" that begins with a text."""
    judge.begin("r", text)
    return judge._records["r"]


def wrote(tokens: Sequence[int]) -> list[RequestStep]:
    """Return the part of "r" in a step that wrote these tokens."""
    return [RequestStep("r", 0, len(tokens), tokens)]


def asked(judge: TextJudge | RecentJudge, draft: Sequence[int]) -> list[float]:
    """Propose a draft of "r"; return its survival."""
    return list(judge.propose(["r"], [draft])[0])


@given(texts, st.integers(0, 80), st.integers(0, 3))
def test_context_follows_its_definition(text: list[int], cut: int, token: int) -> None:
    known = Record([])
    for part in (text[:cut], text[cut:]):
        known.unread.extend(part)
        known.read()
        found = predictor.context(known.text, known.latest, known.length, token, PLACES)
    here = len(text)
    places = [p for p in range(2, here) if text[p - 2 : p] == text[-2:]][-PLACES:]

    def match(place: int) -> int:
        n = 2
        while n < min(LONGEST_MATCH, place) and text[place - 1 - n] == text[here - 1 - n]:
            n += 1
        return n

    agreeing = [match(p) for p in places if text[p] == token]
    opposing = [match(p) for p in places if text[p] != token]
    assert found.places == len(places)
    assert found.agreed == len(agreeing)
    assert found.agreeing == max(agreeing, default=0)
    assert found.opposing == max(opposing, default=0)


def test_acceptance_is_learnt_from_drafts_that_nobody_verified() -> None:
    """Copies go on, inventions do not; the predictor tells them apart by their context."""
    rng = random.Random(0)
    model = TextJudge(8)
    first: dict[str, float] = {}
    for round_ in range(30):
        prompt = rng.sample(range(1000), 200)
        begun(model, prompt[:120] + prompt[:10])
        copy = asked(model, prompt[10:18])
        model.learn(wrote(prompt[10:18]))
        begun(model, [*prompt, 5000, 5001, *prompt[:1], 5000, 5001])
        invention = asked(model, prompt[:8])
        model.learn(wrote([6000 + round_]))
        first.setdefault("copy", copy[0])
        first.setdefault("invention", invention[0])
    assert copy[0] > 0.9 > 0.5 > first["copy"]
    assert copy[7] > 0.6
    assert invention[0] < 0.1 < first["invention"]


def test_drafts_that_were_right_as_far_as_they_were_compared_are_hits() -> None:
    """At K = 0 a step compares one token, and the next draft takes its place."""
    model, text = TextJudge(8), list(range(100))
    record = begun(model, [1, 2, 3, 1, 2])
    for _ in range(10):
        asked(model, [7, 7])
        model.learn(wrote([8]))
    assert record.state["hits"] < 0.1
    for i in range(30):
        asked(model, text[i : i + 8])
        model.learn(wrote(text[i : i + 1]))
    assert record.state["hits"] > 0.9


def test_chances_are_kept_where_there_is_nothing_to_learn_but_noise() -> None:
    """Of drafts that are right by a coin, the most promising are no better: nobody may say so."""
    promised, kept = [], []
    for seed in range(6):
        rng = random.Random(seed)
        model = TextJudge(8)
        made = []
        for _ in range(600):
            begun(model, [rng.randrange(200) for _ in range(30)])
            draft = [rng.randrange(200) for _ in range(4)]
            chance = asked(model, draft)[0]
            right = 0
            while right < 4 and rng.random() < 0.6:
                right += 1
            model.learn(wrote([*draft[:right], 999]))
            made.append((chance, right > 0))
        best = sorted(made[200:], reverse=True)[:100]
        promised.append(np.mean([chance for chance, _ in best]))
        kept.append(np.mean([first for _, first in best]))
    assert np.mean(promised) == pytest.approx(np.mean(kept), abs=0.08)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(1, 8))
def test_a_draft_is_scored_alike_however_its_tokens_come(sizes: list[int], length: int) -> None:
    """Shadows are exact: one token a step or many, the same outcomes are learnt."""
    truth = [7, 8, 9, 7, 8, 4, 4, 4, 7, 8, 9, 1, 2, 3, 7, 8] * 3
    draft = [7, 8, 9, 7, 8, 9, 9, 9][:length]
    whole, pieces = TextJudge(8), TextJudge(8)
    begun(whole, [1, 2])
    asked(whole, draft)
    whole.learn(wrote(truth[:8]))
    record = begun(pieces, [1, 2])
    asked(pieces, draft)
    at = 0
    for size in [*sizes, *[1] * 8]:
        pieces.learn(wrote(truth[at : at + size]))
        at += size
    assert np.array_equal(pieces._model["weights"], whole._model["weights"])
    assert not record.state["judged"]


def test_drafts_of_any_length_are_judged() -> None:
    """Of the longest ones the first part; they are prolonged to any length."""
    text = [i % 7 for i in range(100)]
    model = TextJudge(LONGEST)
    begun(model, text)
    for length in (LONGEST - 1, LONGEST, LONGEST + 1, 5 * LONGEST):
        draft = [(2 + i) % 7 for i in range(length)]
        survival = asked(model, draft)
        assert np.count_nonzero(survival) == min(length, LONGEST)
        (longer,) = model.prolonged(np.array([survival]), [min(length, LONGEST)])
        assert all(0 < b <= a < 1 for a, b in pairwise(longer))
        model.learn(wrote([(2 + i) % 7 for i in range(7)]))
    assert survival[0] > survival[-1] > 0


def test_survival_never_rises_along_a_draft() -> None:
    model = TextJudge(4)
    begun(model, [1, 2, 3, 1, 2])
    for _ in range(20):
        survival = asked(model, [3, 1, 2, 3])
        assert all(0 < b <= a < 1 for a, b in pairwise(survival))
        model.learn(wrote([3, 1, 2, 3]))


def continued(judge: TextJudge, before: Sequence[int], tokens: Sequence[int]) -> None:
    """A request whose text was `before` wrote tokens."""
    begun(judge, before)
    judge.learn(wrote(tokens))


def phrases(judge: TextJudge, before: Sequence[int], draft: Sequence[int]) -> list[list[int]]:
    """Return the buckets of the two phrases that each token of a draft would follow."""
    record = begun(judge, before)
    asked(judge, draft)
    first = [BEGINS["phrase of two"], BEGINS["phrase of four"]]
    found: list[list[int]] = (record.state["own"][0, : len(draft), 4:] - first).tolist()
    return found


def test_phrases_tell_what_followed_them_always_sometimes_and_never() -> None:
    judge = TextJudge(4)
    for i in range(6):
        continued(judge, [9, 1, 2], [3, 5 if i % 2 else 6])
    always, never = (phrases(judge, [8, 9, 1, 2], [token])[0][0] for token in (3, 4))
    sometimes = phrases(judge, [9, 1, 2, 3], [5])[0][0]
    unknown = phrases(judge, [9, 1, 2, 7], [5])[0]
    assert unknown == [0, 0]
    assert len({0, always, sometimes, never}) == 4
    assert all(0 < c < BUCKETS for c in (always, sometimes, never))


@given(st.lists(st.integers(0, 5), min_size=12, max_size=30), st.integers(1, 11))
def test_phrases_are_counted_alike_however_the_tokens_come(text: list[int], cut: int) -> None:
    whole, parts = TextJudge(4), TextJudge(4)
    continued(whole, [], text)
    continued(parts, [], text[:cut])
    continued(parts, text[:cut][-4:], text[cut:])
    assert phrases(whole, text[-4:], text) == phrases(parts, text[-4:], text)


def test_phrases_fade_and_their_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecascade.core.marginal.acceptance.HALVED_EVERY", 1000)
    judge = TextJudge(4)
    continued(judge, [1, 2, 3, 4], [5] * 3)
    known = phrases(judge, [1, 2, 3, 4], [5])
    for i in range(20):
        continued(judge, [0] * 4, range(10_000 + 1000 * i, 11_000 + 1000 * i))
    counts = judge._model["seen"]
    assert counts.nbytes == judge._model["followed"].nbytes == 4 * SLOTS
    assert phrases(judge, [1, 2, 3, 4], [5]) != known
    assert float(counts.sum()) < 4 * 1000


def test_judging_is_asking_twice_the_same_changes_nothing() -> None:
    judge = TextJudge(8)
    record = begun(judge, [1, 2, 3, 4, 1, 2, 3])
    for _ in range(5):
        asked(judge, [4, 1, 2])
        judge.learn(wrote([4]))
    first = asked(judge, [1, 2])
    model, state = judge._model.copy(), record.state.copy()
    assert asked(judge, [1, 2]) == first
    assert judge._model.tobytes() == model.tobytes()
    assert record.state.tobytes() == state.tobytes()


Case = tuple[list[int], list[int], bool]  # a text, a draft, and whether its tokens are right


def copied(fresh: Iterator[int], *endings: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Return a text whose ending occurred before, and two tokens.

    Each (length, i) is an earlier place where so many of the text's last tokens occurred, and were
    followed by token i of the two.
    """
    ending = [next(fresh) for _ in range(24)]
    follow = [next(fresh), next(fresh)]
    text: list[int] = []
    for length, i in endings:
        text += [next(fresh), *ending[-length:], follow[i]]
    return [*text, next(fresh), *ending], follow


def by_match(fresh: Iterator[int], good: bool) -> Case:
    """A long match or a short one."""
    text, follow = copied(fresh, (20 if good else 3, 0))
    return text, follow[:1], good


def by_agreed(fresh: Iterator[int], good: bool) -> Case:
    """The same match once or twice, with nothing against it."""
    text, follow = copied(fresh, *[(3, 0)] * (2 if good else 1))
    return text, follow[:1], good


def by_against(fresh: Iterator[int], good: bool) -> Case:
    """The same match for the draft, a short one or a long one against it."""
    text, follow = copied(fresh, (3, 0), (3 if good else 12, 1))
    return text, follow[:1], good


def by_four(fresh: Iterator[int], good: bool) -> Case:
    """The same two tokens before the draft, and others before these."""
    return [next(fresh), *((1, 2) if good else (3, 4)), 5, 6], [7], good


def by_two(fresh: Iterator[int], good: bool) -> Case:
    """The same token before the draft, another before that."""
    return [next(fresh), next(fresh), next(fresh), 1 if good else 2, 5], [7], good


def by_token(fresh: Iterator[int], good: bool) -> Case:
    """The token itself."""
    return [next(fresh) for _ in range(4)], [1 if good else 2], good


def by_before(fresh: Iterator[int], good: bool) -> Case:
    """The token before it."""
    return [next(fresh), next(fresh), 1 if good else 2], [next(fresh)], good


def by_pair(fresh: Iterator[int], good: bool) -> Case:
    """Both together: each of the two tokens is as often right as wrong."""
    first, second = random.Random(next(fresh)).choice(
        [(1, 1), (2, 2)] if good else [(1, 2), (2, 1)]
    )
    return [next(fresh), next(fresh), first], [2 + second], good


@pytest.mark.parametrize(
    ("case", "feature"),
    [
        (by_match, "match"),
        (by_agreed, "agreed"),
        (by_against, "against"),
        (by_four, ""),
        (by_two, ""),
        (by_token, ""),
        (by_before, ""),
        (by_pair, ""),
    ],
)
def test_each_feature_is_learnt_from_a_text_that_it_alone_explains(
    case: Callable[[Iterator[int], bool], Case], feature: str
) -> None:
    """Without it nothing else tells right drafts from wrong ones."""
    names = list(BEGINS)
    unused = slice(0)  # weights that stay as they were

    def gap() -> float:
        judge, fresh, said = TextJudge(2), count(1000), {}
        for i in range(400):
            text, draft, right = case(fresh, bool(i % 2))
            begun(judge, text)
            # Drafts of one token teach. Asked is about the token after it, in a place of which
            # nothing is known, or where the text says no more, about the first.
            asked(judge, [*draft, next(fresh)])
            odds = judge._records["r"].state["odds"][0]
            said[right] = odds[1] if case is by_match else odds[0]
            asked(judge, draft)
            judge.learn(wrote(draft if right else [next(fresh)]))
            judge._model["weights"][0, unused] = 0.0
            judge.end("r")
        return float(said[True] - said[False])

    assert gap() > 0.5
    if feature:
        unused = slice(BEGINS[feature], BEGINS[names[names.index(feature) + 1]])
        assert gap() < 0.1


@pytest.mark.parametrize("known", [{"hits": 0.9}, {"last": 26}])
def test_how_the_last_drafts_fared_tells_how_the_next_will(known: dict[str, float]) -> None:
    judge, fresh = TextJudge(2), count(1000)
    for i in range(400):
        record = begun(judge, [next(fresh) for _ in range(4)])
        for name, value in known.items():
            record.state[name] = value if i % 2 else 0
        draft = [next(fresh)]
        odds = asked(judge, draft)[0]
        judge.learn(wrote(draft if i % 2 else [next(fresh)]))
        if i % 2:
            good = odds
        else:
            bad = odds
    assert good > 0.6 > 0.4 > bad


def test_places_in_a_draft_are_told_apart() -> None:
    judge, fresh = TextJudge(2), count(1000)
    for _ in range(200):
        begun(judge, [next(fresh) for _ in range(4)])
        draft = [next(fresh), next(fresh)]
        survival = asked(judge, draft)
        judge.learn(wrote([draft[0], next(fresh)]))
    assert survival[0] > 0.8
    assert survival[1] / survival[0] < 0.3


def test_what_a_draft_s_tokens_share_is_learnt_once_for_all_of_them() -> None:
    """Two drafts alike but in length: the longer one teaches the shared weights more."""
    moved = []
    for length in (1, 4):
        judge, fresh = TextJudge(4), count(1000)
        begun(judge, [next(fresh) for _ in range(4)])
        draft = [next(fresh) for _ in range(length)]
        asked(judge, draft)
        judge.learn(wrote(draft))
        moved.append(judge._model["weights"][0, 0, 0])
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize("fault", [RuntimeError("no locator"), OSError("disk full")])
def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    njit = numba.njit

    def full(signature: object, cache: bool = False) -> object:
        if cache:
            raise fault
        return njit(signature)

    monkeypatch.setattr(numba, "njit", full)
    double = predictor.compiled(numba.int64)(lambda n: 2 * n)
    assert double(4) == 8


def lived(judge: RecentJudge, drafts: Sequence[Sequence[int]], name: str = "r") -> list[float]:
    """Compare drafts of four tokens in turn with what is written; return the next survival."""
    judge.begin(name, [])
    for tokens in drafts:
        judge.propose([name], [[1, 2, 3, 4]])
        judge.learn([RequestStep(name, 0, len(tokens), tokens)])
    return list(judge.propose([name], [[1, 2, 3, 4]])[0])


def test_recent_drafts_tell_requests_apart() -> None:
    judge = RecentJudge(4)
    for _ in range(20):
        copies = lived(judge, [[1, 2, 3, 4, 5]] * 20, "copies")
        invents = lived(judge, [[9]] * 20, "invents")
    assert copies[0] > 0.9
    assert copies[3] > 0.8
    assert invents[0] < 0.1
    assert all(b <= a for row in (copies, invents) for a, b in pairwise(row))


def test_a_draft_cut_short_says_nothing_of_the_tokens_not_seen() -> None:
    judge, knows = RecentJudge(2), [[1]] * 800  # the first was right; the second never compared
    survival = lived(judge, knows)
    assert survival[0] > 0.95
    assert survival[1] / survival[0] == pytest.approx(0.7, abs=0.01)  # as before it is known


def test_recent_drafts_are_forgotten_in_time() -> None:
    """After long luck, the same state turns bad: the table follows within some hundred steps."""
    judge = RecentJudge(4)
    lived(judge, [[1, 2, 3, 4]] * 3000)
    judge.begin("r", [])
    last = judge.propose(["r"], [[1, 2, 3, 4]])[0][0]
    state = 80  # of those whose last four drafts were all right
    for _ in range(1500):
        judge._states["r"] = state
        judge.propose(["r"], [[1, 2, 3, 4]])
        judge.learn([RequestStep("r", 0, 1, [9])])
    judge._states["r"] = state
    assert judge.propose(["r"], [[1, 2, 3, 4]])[0][0] < 0.1 < last


def test_drafts_of_a_step_that_the_other_judge_decided_are_not_compared() -> None:
    judge = RecentJudge(4)
    before = lived(judge, [])
    judge.follow([RequestStep("r", 0, 1, [9])])
    for _ in range(8):
        judge.learn([RequestStep("r", 0, 1, [9])])
    assert list(judge.propose(["r"], [[1]])[0]) == before
    text = TextJudge(4)
    record = begun(text, [1, 2, 3])
    asked(text, [4])
    text.follow(wrote([9]))
    assert record.tokens == [1, 2, 3, 9]
    text.learn(wrote([4]))
    assert not text._model["weights"][0, :, 0].any()
