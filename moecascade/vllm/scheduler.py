"""vLLM's scheduler with the draft length of every request chosen by a policy.

It only translates: vLLM's step outputs become a `Step`, a `Decision` becomes a cut draft. Who
decides is the `Controller`'s business, time the `StepClock`'s, logs are the `Recorder`'s. In the
order in which the engine calls it, a step is

    schedule                 (asynchronous: ask the policies for K, cut what was set aside to it)
    _update_after_schedule   say how far a model drafter has to draft
    (the model runs, the drafter proposes)
    update_from_output       take the time, show the policies what the step did
    update_draft_token_ids   (synchronous: ask the policies for K, cut the drafts to it)

With asynchronous scheduling a step is scheduled while the one before it runs: policies decide
without having seen the draft, and without knowing what that step did. vLLM then keeps as many -1 as
the drafter makes tokens in a draft's place; the worker puts the tokens there.

Nothing of ours may raise into the engine: `_safely` logs a fault once, counts it, and the engine
goes on without what failed; a draft that nobody decided about is not verified.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast

from vllm.v1.core.sched.async_scheduler import AsyncScheduler as VllmAsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler

from moecascade.core.controller import Controller
from moecascade.core.options import server_options
from moecascade.core.step import Decision, Proposal, RequestStep, Step
from moecascade.telemetry.recorder import Recorder
from moecascade.vllm import compat, drafters, support
from moecascade.vllm.clock import StepClock
from moecascade.vllm.link import Link

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

P = ParamSpec("P")
R = TypeVar("R")


class Scheduler(VllmScheduler):
    """`--scheduler-cls moecascade.vllm.Scheduler`; configured by `options.ServerOptions`.

    Made, it is one of the two below, whichever the engine's way of scheduling asks for.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Choose between the two."""
        if cls is not Scheduler:
            return cast("Self", super().__new__(cls))
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        is_async = config.scheduler_config.async_scheduling
        return cast("Self", super().__new__(AsyncScheduler if is_async else SyncScheduler))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check the configuration; ConfigError or SetupError stop the engine at start."""
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        support.check_hooks(VllmScheduler)
        support.check_supported(config)
        shows_drafts = isinstance(self, SyncScheduler)
        self._drafter = drafters.drafter(config)
        self._max_k = self._drafter.max_k
        self._passes = 0  # of the drafter at the end of the last step, beyond the first
        self._draftless = False  # whether the drafter did not run at the end of the last step
        self._decisions: dict[str, Decision] = {}  # the last one of each request
        self._under_way: list[tuple[SchedulerOutput, dict[str, Decision]]] = []  # steps, in order
        self._ended: list[str] = []  # requests that ended, but may be in the step under way
        self.cascade_faults: Counter[str] = Counter()
        facts = support.facts(config)
        options = server_options(config.additional_config, self._max_k, facts, shows_drafts)
        facts |= support.expected_facts(config, compat.device_name())
        self._clock = StepClock()
        self.controller = Controller(
            options, self._max_k, self._report, facts, shows_drafts, time.perf_counter
        )
        say = partial(support.logger.info, "moecascade: %s")
        self._recorder = Recorder(options, self._report, facts, say)
        self._link = self._safely(self._linked) if options.metrics else None
        support.logger.info("moecascade: policy %r, K from 0 to %d", options.policy, self._max_k)

    # ---- what the engine calls, in the order of a step -------------------------------------------

    def add_request(self, request: Request) -> None:
        """Add a request, under the policy that it asks for."""
        known = request.request_id in self.requests  # a streaming session's next input
        super().add_request(request)
        if not known:
            self._safely(self._begin, request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step."""
        self._clock.begin()
        output = super().schedule(*args, **kwargs)
        self._safely(self._send, output)
        return output

    def _update_after_schedule(self, output: SchedulerOutput) -> None:
        """Tell the drafter how far to draft at the end of the step; vLLM reads it below."""
        k: int | None = self._max_k
        if self._drafter.one_by_one:
            with self._clock.deciding():
                k = self._safely(self.controller.lookahead, list(output.num_scheduled_tokens))
        elif self._drafter.idles:
            with self._clock.deciding():
                wanted = self._safely(self.controller.drafts, list(output.num_scheduled_tokens))
            k = self._max_k if wanted else 0
        compat.limit_drafting(output, k or 0)
        super()._update_after_schedule(output)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Process what the step made; then show it to the policies."""
        live = self._safely(compat.live, scheduler_output, self.requests) or ()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._safely(self._observe, scheduler_output, model_runner_output, live)
        self._safely(self._forget_ended)
        self._clock.processed()
        self._recorder.flush(self._clock.idle)
        return outputs

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Free a request, finished or aborted; what is kept of it here goes after the step."""
        self._ended.append(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def set_pause_state(self, *args: Any, **kwargs: Any) -> None:
        """Pause or go on; the time between is no step's."""
        self._clock.stop()
        super().set_pause_state(*args, **kwargs)

    def shutdown(self) -> None:
        """Close our logs as well."""
        self._recorder.close()
        if self._link is not None:
            self._link.close()
        super().shutdown()

    # ---- translation -----------------------------------------------------------------------------

    def _linked(self) -> Link | None:
        """Answer API servers, where this process was started by one or beside one."""
        if multiprocessing.parent_process() is None:
            return None

        def answer(question: Mapping[str, Any]) -> Any:
            return self._recorder.answer(question, self.controller.policies)

        return Link(compat.engine_number(self.vllm_config), answer)

    def _begin(self, request: Request) -> None:
        self._forget_ended()  # one of them may have had the same name
        prompt = compat.prompt_tokens(request)
        asked = self.controller.begin(request.request_id, compat.extra_args(request), prompt)
        spec = self.controller.spec(request.request_id)
        self._recorder.begin(request.request_id, asked, prompt, spec)

    def _forget_ended(self) -> None:
        while self._ended:
            request_id = self._ended.pop()
            self._decisions.pop(request_id, None)
            self.controller.drop(request_id)
            self._recorder.end(request_id)

    def _send(self, output: SchedulerOutput) -> None:
        """A step is sent to the model: keep what was decided for it."""
        if not compat.is_empty(output):
            known = self._decisions
            here = {name: known[name] for name in output.num_scheduled_tokens if name in known}
            self._under_way.append((output, here))

    def _decided(self, output: SchedulerOutput) -> dict[str, Decision]:
        """Return what was decided for a step, which is done, as are those before it."""
        while self._under_way:
            sent, decisions = self._under_way.pop(0)
            if sent is output:
                return decisions
        return {}

    def _observe(
        self, output: SchedulerOutput, results: ModelRunnerOutput, live: Container[str]
    ) -> None:
        seconds = self._clock.end(busy=self.has_unfinished_requests())
        if compat.is_empty(output):
            return
        decisions = self._decided(output)
        parts = tuple(
            self._part(request_id, drafted, results, decisions)
            if request_id in live
            else RequestStep(request_id, 0, 0)  # it ended meanwhile: nobody gets its tokens
            for request_id, drafted in compat.verified(output)
        )
        decode = compat.is_decode(output) and all(part.emitted for part in parts)
        drafting = self._drafter.one_by_one and not self._draftless
        passes = compat.drafter_passes(output) if drafting else 0
        in_time = self._passes if self._drafter.counted_late else passes
        self._passes = passes
        step = Step(seconds, decode, parts, in_time)
        self._recorder.step(step, decisions, self.controller.spec, self._clock.take())
        with self._clock.deciding():
            self.controller.observe(step)

    def _part(
        self,
        request_id: str,
        drafted: int,
        results: ModelRunnerOutput,
        decisions: Mapping[str, Decision],
    ) -> RequestStep:
        tokens = compat.emitted(results, request_id)
        decision = decisions.get(request_id)
        return RequestStep(
            request_id, drafted, len(tokens), tokens, decision.k if decision else None
        )

    def _decide(self, proposals: Sequence[Proposal]) -> dict[str, Decision]:
        """Return the policies' decisions; they hold for the next step of each request."""
        self._recorder.propose(proposals)
        decided = self.controller.decide(proposals, explain=self._recorder.wants_reasons())
        self._decisions.update(decided)
        return decided

    # ---- faults ----------------------------------------------------------------------------------

    def _safely(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return what `call` returns, or None where it raises."""
        try:
            return call(*args, **kwargs)
        except Exception as fault:  # noqa: BLE001 -- the engine must go on
            self._report(getattr(call, "__name__", "call"), f"{fault!r}; going on without it")
            return None

    def _report(self, what: str, message: str) -> None:
        """Count a fault; log the first of its kind."""
        self.cascade_faults[what] += 1
        self._recorder.fault(what)
        if self.cascade_faults[what] == 1:
            support.logger.warning("moecascade: %s: %s (logged once)", what, message)


class SyncScheduler(Scheduler):
    """The scheduler where a step is scheduled once the one before it is known, with its drafts."""

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafter's proposals for the next step, each cut to its request's K."""
        self._clock.handed_over()
        with self._clock.deciding():
            cut = self._safely(self._cut, draft_token_ids)
        if cut is None:
            cut = compat.with_drafts(draft_token_ids, [[] for _ in draft_token_ids.req_ids])
        super().update_draft_token_ids(cut)

    def _send(self, output: SchedulerOutput) -> None:
        super()._send(output)
        compat.ask_for_drafts(output)

    def _cut(self, proposed: DraftTokenIds) -> DraftTokenIds:
        if any(proposed.draft_token_ids):
            self._draftless = compat.drafted_nothing(proposed, self._max_k)
        proposals = []
        for request_id, tokens in zip(proposed.req_ids, proposed.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is not None and not request.is_prefill_chunk and not request.is_finished():
                proposals.append(Proposal(request_id, self._usable(tokens, request)))
        decided = self._decide(proposals)
        drafts: dict[str, list[int]] = {request_id: [] for request_id in proposed.req_ids}
        for proposal in proposals:
            if decision := decided.get(proposal.request_id):
                drafts[proposal.request_id] = list(proposal.tokens[: decision.k])
        return compat.with_drafts(proposed, list(drafts.values()))

    def _usable(self, draft: list[int], request: Request) -> list[int]:
        """Return what of a draft the drafter thought of, and the answer has room for."""
        if self._draftless:
            return []
        found = compat.found(draft)
        if draft and not found and not self._drafter.gaps:
            self._report("drafts", "vLLM's worker does not tell them, so none is verified")
        if found and self._drafter.pads:
            found = compat.without_fill(found, request.all_token_ids)
        return found[: compat.room(request)]


class AsyncScheduler(Scheduler, VllmAsyncScheduler):
    """The scheduler where a step is scheduled while the one before it runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: Container[str] = ()  # requests of the step scheduled last

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step, with as many drafts of each request as policies want."""
        with self._clock.deciding():
            if self._safely(self._cut) is None:
                for request in self.running:
                    compat.set_aside(request, 0)
        output = super().schedule(*args, **kwargs)
        self._last = output.num_scheduled_tokens  # where it is empty as well: see `_cut`
        return output

    def _cut(self) -> bool:
        """Cut what vLLM has set aside for drafts to K; return that it was done."""
        asked = []
        for request in self.running:
            length = compat.aside(request)
            if length and not self.use_v2_model_runner and request.request_id not in self._last:
                # It sat out a step, and the first runner lost its drafts with its place in the
                # batch. They would be verified as so many tokens of id 0.
                compat.set_aside(request, length := 0)
            if not request.is_prefill_chunk:
                length = min(length, compat.room(request))
                asked.append((request, Proposal(request.request_id, unseen=length)))
        decided = self._decide([proposal for _, proposal in asked])
        for request, proposal in asked:
            compat.set_aside(request, min(decided[request.request_id].k, proposal.unseen))
        return True
