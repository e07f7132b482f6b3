"""vLLM's scheduler with the draft length of every request chosen by a policy.

It only translates: vLLM's step outputs become a `Step`, a `Decision` becomes a cut draft. Who
decides is the `Controller`'s business, time the `StepClock`'s, logs are the `Recorder`'s. In the
order in which the engine calls it, a step is

    schedule                 say how far a model drafter has to draft
    (the model runs, the drafter proposes)
    update_from_output       take the time, show the policies what the step did
    update_draft_token_ids   ask the policies for K, cut the drafts to it

Nothing of ours may raise into the engine: `_safely` logs a fault once, counts it, and the engine
goes on without what failed; a draft that nobody decided about is not verified.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler

from moecascade.core.controller import Controller
from moecascade.core.options import server_options
from moecascade.core.step import Decision, Proposal, RequestStep, Step
from moecascade.telemetry.recorder import Recorder
from moecascade.vllm import compat, support
from moecascade.vllm.clock import StepClock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

P = ParamSpec("P")
R = TypeVar("R")


class Scheduler(VllmScheduler):
    """`--scheduler-cls moecascade.vllm.Scheduler`; configured by `options.ServerOptions`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check the configuration; ConfigError or SetupError stop the engine at start."""
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        support.check_hooks(VllmScheduler)
        support.check_supported(config)
        self._max_k = support.max_k(config)
        self._drafts_cost = support.drafts_cost(config)
        self._fills_up = support.fills_up(config)
        self._draftless = False  # whether the drafter did not run at the end of the last step
        self._decisions: dict[str, Decision] = {}  # the last one of each request
        self._ended: list[str] = []  # requests that ended, but may be in the step under way
        self.cascade_faults: Counter[str] = Counter()
        facts = support.model_facts(config)
        options = server_options(config.additional_config, self._max_k, facts)
        self.controller = Controller(options, self._max_k, self._report, facts)
        self._clock = StepClock()
        self._recorder = Recorder(options, self._report)
        support.logger.info("moecascade: policy %r, K from 0 to %d", options.policy, self._max_k)

    # ---- what the engine calls, in the order of a step -------------------------------------------

    def add_request(self, request: Request) -> None:
        """Add a request, under the policy that it asks for."""
        known = request.request_id in self.requests  # a streaming session's next input
        super().add_request(request)
        if not known:
            self._safely(self._begin, request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step; tell a model drafter how far to draft at its end."""
        self._clock.begin()
        output = super().schedule(*args, **kwargs)
        self._safely(compat.ask_for_drafts, output)
        if self._drafts_cost:
            with self._clock.deciding():
                k = self._safely(self.controller.lookahead, list(output.num_scheduled_tokens))
            compat.limit_drafting(output, k or 0)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Process what the step made; then show it to the policies."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._safely(self._observe, scheduler_output, model_runner_output)
        self._safely(self._forget_ended)
        self._clock.processed()
        self._recorder.flush(self._clock.idle)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafter's proposals for the next step, each cut to its request's K."""
        self._clock.handed_over()
        with self._clock.deciding():
            cut = self._safely(self._cut, draft_token_ids)
        if cut is None:
            cut = compat.with_drafts(draft_token_ids, [[] for _ in draft_token_ids.req_ids])
        super().update_draft_token_ids(cut)

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
        super().shutdown()

    # ---- translation -----------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        self._forget_ended()  # one of them may have had the same name
        prompt = compat.prompt_tokens(request)
        task = self.controller.begin(request.request_id, compat.extra_args(request), prompt)
        self._recorder.begin(request.request_id, task, prompt)

    def _forget_ended(self) -> None:
        while self._ended:
            request_id = self._ended.pop()
            self._decisions.pop(request_id, None)
            self.controller.drop(request_id)
            self._recorder.end(request_id)

    def _observe(self, output: SchedulerOutput, results: ModelRunnerOutput) -> None:
        seconds = self._clock.end(busy=self.has_unfinished_requests())
        if compat.is_empty(output):
            return
        parts = tuple(
            RequestStep(request_id, drafted, len(tokens), tokens)
            for request_id, drafted in compat.verified(output)
            for tokens in [compat.emitted(results, request_id)]
        )
        decode = compat.is_decode(output) and all(part.emitted for part in parts)
        drafting = self._drafts_cost and not self._draftless
        step = Step(seconds, decode, parts, compat.drafter_passes(output) if drafting else 0)
        self._recorder.step(step, self._decisions, self.controller.spec, self._clock.take())
        with self._clock.deciding():
            self.controller.observe(step)

    def _cut(self, proposed: DraftTokenIds) -> DraftTokenIds:
        if any(proposed.draft_token_ids):
            self._draftless = compat.drafted_nothing(proposed, self._max_k)
        proposals = []
        for request_id, tokens in zip(proposed.req_ids, proposed.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is not None and not request.is_prefill_chunk and not request.is_finished():
                proposals.append(Proposal(request_id, self._usable(tokens, request)))
        decided = self.controller.decide(proposals, explain=self._recorder.logs_steps)
        self._decisions.update(decided)
        drafts: dict[str, list[int]] = {request_id: [] for request_id in proposed.req_ids}
        for proposal in proposals:
            if decision := decided.get(proposal.request_id):
                drafts[proposal.request_id] = list(proposal.tokens[: decision.k])
        return compat.with_drafts(proposed, list(drafts.values()))

    def _usable(self, draft: list[int], request: Request) -> list[int]:
        """Return what of a draft the drafter thought of, and the answer has room for."""
        if self._draftless:
            return []
        if draft and not compat.told(draft):
            self._report("drafts", "vLLM's worker does not tell them, so none is verified")
            return []
        if draft and self._fills_up:
            draft = compat.without_fill(draft, request.all_token_ids)
        return draft[: compat.room(request)]

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
        if self.cascade_faults[what] == 1:
            support.logger.warning("moecascade: %s: %s (logged once)", what, message)
