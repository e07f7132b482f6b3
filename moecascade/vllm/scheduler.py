"""vLLM's scheduler with the draft length of every request chosen by a policy.

It only translates: vLLM's step outputs become a `Step`, a `Decision` becomes a cut draft. In the
order in which the engine calls it, a step is

    schedule                 say how far a model drafter has to draft
    (the model runs, the drafter proposes)
    update_from_output       take the time, show the policies what the step did
    update_draft_token_ids   ask the policies for K, cut the drafts to it

Nothing of ours may raise into the engine: `_safely` logs a fault once, counts it, and the engine
goes on without what failed; a draft that nobody decided about is not verified.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler

from moecascade.core.controller import Controller
from moecascade.core.options import (
    CONFIG_KEY,
    RequestOptions,
    request_options,
    server_options,
    what_is_right,
)
from moecascade.core.step import Decision, Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.telemetry.step_log import StepLog
from moecascade.telemetry.traces import TraceLog
from moecascade.vllm import compat, support

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

P = ParamSpec("P")
R = TypeVar("R")

FLUSH_SECONDS = 1.0  # after which logs are flushed also under load


@contextmanager
def _named(key: str, path: str) -> Iterator[None]:
    """Say which file of the configuration cannot be opened."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f'additional_config["{CONFIG_KEY}"]: {key} {path!r} cannot be written '
            f"({error.strerror}); choose another file"
        ) from error


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
        facts = support.model_facts(config)
        self._options = server_options(config.additional_config, self._max_k, facts)
        self._began: float | None = None  # when the step under way began; None while idle
        self._decisions: dict[str, Decision] = {}  # the last one of each request
        self._ended: list[str] = []  # requests that ended, but may be in the step under way
        self.cascade_faults: Counter[str] = Counter()
        self.controller = Controller(self._options, self._max_k, self._report, facts)
        self._controller_seconds = 0.0  # spent since the last step was observed
        self._handover_seconds = 0.0  # waited for drafts since then
        self._updated: float | None = None  # when the last step had been processed
        self._flushed = 0.0  # when the logs were flushed last
        options = self._options
        with _named("step_log", options.step_log):
            self._step_log = StepLog(options.step_log) if options.step_log else None
        with _named("trace_log", options.trace_log):
            self._trace_log = (
                TraceLog(options.trace_log, options.trace_tokens) if options.trace_log else None
            )
        support.logger.info(
            "moecascade: policy %r, K from 0 to %d", self._options.policy, self._max_k
        )

    # ---- what the engine calls, in the order of a step -------------------------------------------

    def add_request(self, request: Request) -> None:
        """Add a request, under the policy that it asks for."""
        known = request.request_id in self.requests  # a streaming session's next input
        super().add_request(request)
        if not known:
            self._safely(self._begin, request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step; tell a model drafter how far to draft at its end."""
        if self._began is None:
            self._began = time.perf_counter()
        output = super().schedule(*args, **kwargs)
        self._safely(compat.ask_for_drafts, output)
        if self._drafts_cost:
            began = time.perf_counter()
            k = self._safely(self.controller.lookahead, list(output.num_scheduled_tokens))
            self._controller_seconds += time.perf_counter() - began
            compat.limit_drafting(output, k or 0)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Process what the step made; then show it to the policies."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._safely(self._observe, scheduler_output, model_runner_output)
        self._safely(self._forget_ended)
        self._updated = time.perf_counter()
        if self._began is None or self._updated - self._flushed > FLUSH_SECONDS:
            self._safely(self._flush)
            self._flushed = self._updated
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafter's proposals for the next step, each cut to its request's K."""
        began = time.perf_counter()
        if self._updated is not None:
            self._handover_seconds += began - self._updated
        cut = self._safely(self._cut, draft_token_ids)
        self._controller_seconds += time.perf_counter() - began
        if cut is None:
            cut = compat.with_drafts(draft_token_ids, [[] for _ in draft_token_ids.req_ids])
        super().update_draft_token_ids(cut)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Free a request, finished or aborted; what is kept of it here goes after the step."""
        self._ended.append(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def set_pause_state(self, *args: Any, **kwargs: Any) -> None:
        """Pause or go on; the time between is no step's."""
        self._began = None
        super().set_pause_state(*args, **kwargs)

    def shutdown(self) -> None:
        """Close our logs as well."""
        for log in (self._step_log, self._trace_log):
            if log is not None:
                self._safely(log.close)
        super().shutdown()

    # ---- translation -----------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        self._forget_ended()  # one of them may have had the same name
        extra, known = compat.extra_args(request), self.controller.settings_of
        prompt = compat.prompt_tokens(request)
        try:
            asked = request_options(extra, self._max_k, known)
        except ConfigError as error:
            # `moecascade.vllm.http` answers these with status 400 where it is installed; here, in
            # the engine's process, refusing is too late: what else it asks for is done.
            self._report("request options", f"{error}; the request runs without this one")
            asked = what_is_right(extra, self._max_k, known)
        if not self._options.request_options:
            asked = RequestOptions(task=asked.task)
        try:
            self.controller.add(request.request_id, asked, prompt)
        except ConfigError as error:
            self._report("policies", f"{error}; the request runs under the server's policy")
            asked = replace(asked, policy=None)
            self.controller.add(request.request_id, asked, prompt)
        if self._trace_log is not None:
            with self._given_up("trace_log"):
                self._trace_log.begin(request.request_id, asked.task, prompt)

    def _forget_ended(self) -> None:
        while self._ended:
            request_id = self._ended.pop()
            self._decisions.pop(request_id, None)
            self.controller.drop(request_id)
            if self._trace_log is not None:
                with self._given_up("trace_log"):
                    self._trace_log.end(request_id)

    def _observe(self, output: SchedulerOutput, results: ModelRunnerOutput) -> None:
        now = time.perf_counter()
        began, busy = self._began, self.has_unfinished_requests()
        self._began = now if busy else None
        if not compat.is_empty(output):
            parts = tuple(
                RequestStep(request_id, drafted, len(tokens), tokens)
                for request_id, drafted in compat.verified(output)
                for tokens in [compat.emitted(results, request_id)]
            )
            decode = compat.is_decode(output) and all(part.emitted for part in parts)
            drafting = self._drafts_cost and not self._draftless
            passes = compat.drafter_passes(output) if drafting else 0
            step = Step(None if began is None else now - began, decode, parts, passes)
            if self._step_log is not None:
                with self._given_up("step_log"):
                    self._log_step(self._step_log, step)
                self._controller_seconds = self._handover_seconds = 0.0
            if self._trace_log is not None:
                with self._given_up("trace_log"):
                    self._trace_log.step(step)
            learning = time.perf_counter()
            self.controller.observe(step)
            self._controller_seconds += time.perf_counter() - learning

    def _log_step(self, log: StepLog, step: Step) -> None:
        ids = [part.request_id for part in step.requests]
        log.write(
            step,
            self._decisions,
            {request_id: self.controller.spec(request_id) for request_id in ids},
            self._controller_seconds,
            self._handover_seconds,
        )

    def _flush(self) -> None:
        if self._step_log is not None:
            with self._given_up("step_log"):
                self._step_log.flush()
        if self._trace_log is not None:
            with self._given_up("trace_log"):
                self._trace_log.flush()

    def _cut(self, proposed: DraftTokenIds) -> DraftTokenIds:
        if any(proposed.draft_token_ids):
            self._draftless = compat.drafted_nothing(proposed, self._max_k)
        proposals = []
        for request_id, tokens in zip(proposed.req_ids, proposed.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is not None and not request.is_prefill_chunk and not request.is_finished():
                proposals.append(Proposal(request_id, self._usable(tokens, request)))
        decided = self.controller.decide(proposals, explain=self._step_log is not None)
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

    @contextmanager
    def _given_up(self, log: str) -> Iterator[None]:
        """Give up a log that cannot be written: a full disk must cost neither steps nor drafts."""
        try:
            yield
        except Exception as fault:  # noqa: BLE001 -- the engine must go on
            self._report(log, f"{fault!r}; going on without this log")
            setattr(self, f"_{log}", None)

    def _report(self, what: str, message: str) -> None:
        """Count a fault; log the first of its kind."""
        self.cascade_faults[what] += 1
        if self.cascade_faults[what] == 1:
            support.logger.warning("moecascade: %s: %s (logged once)", what, message)
