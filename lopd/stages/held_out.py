"""Held-out evaluation between steps: the student's servers get the newest weights and answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.config import Config
from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.first_rank import run_on_first_rank
from lopd.records import Prompt, Response
from lopd.report.held_out import NUM_SHOWN, write_transcripts
from lopd.report.metrics import read_metrics
from lopd.stages.between_steps import StepHook
from lopd.stages.sample_shards import sampling_params
from lopd.stages.student import StudentServer
from lopd.stages.sync import MAX_SENDS
from lopd.stages.training import TrainingJob
from lopd.stages.training_kl import TRAINING_REVERSE_KL, mean_between, rise_of
from lopd.stages.vocabulary import num_shared_ids, within_ids
from lopd.tasks import Verifier, get_task
from lopd.tasks.accuracy import wilson_interval
from lopd.tasks.chat_template import prompt_tokenizer, render_time
from lopd.tasks.prompts import load_prompts
from lopd.tasks.rendered import kept_in
from lopd.tasks.tokenizer import response_text
from lopd.tasks.verdicts import Judged, judge_all
from sglang_rollout.requests.client import OtherWeights, SGLangEngine
from sglang_rollout.requests.sampling import SamplingRequest, request_seed

if TYPE_CHECKING:
    from lopd.stages.training_rank import Training


class HeldOutEvaluation(StepHook):
    """Every ``distill.sync_every`` steps: a weight sync, then answers to held-out prompts."""

    def __init__(self, job: TrainingJob, student: StudentServer) -> None:
        self._job = job
        self._student = student
        self._every = job.config.distill.sync_every

    def begin(self, training: Training) -> None:
        """Load the held-out prompts, and find the evaluations of a command that was killed."""
        self._state = training.state
        self._metrics = training.metrics
        # Rank 0 alone talks to the servers, so only it needs the prompts and a tokenizer.
        self._answers: HeldOutAnswers | None = None
        if self._student.engine is not None:
            model = self._job.initial
            self._answers = HeldOutAnswers(self._job.config, model, self._student.engine)
        self._evaluated = self._evaluated_before()

    def _evaluated_before(self) -> set[int]:
        """Return the steps whose evaluation is in the metrics already. Collective."""
        # A command may have been killed after the evaluation of a step and after its checkpoint.
        # Rank 0 alone owns the metrics, and all ranks must skip the same evaluations.
        steps: list[int] = []
        if parallel.rank() == 0:
            rows = read_metrics(self._job.config.run.dir, kind="eval", stage=self._job.stage)
            steps = [row["step"] for row in rows]
        return set(parallel.gather_objects(steps)[0])

    def before_step(self, step: int) -> None:
        if step % self._every != 0:
            return
        # An evaluation that is skipped sends no weights. A refresh before this step does it then.
        if step not in self._evaluated:
            self.evaluate(step)
        # The servers were started with the weights of step 0, so there it is no sync that counts.
        self._state["weight_syncs"] += step > 0

    def end(self) -> None:
        # The result of the training is always evaluated: a killed command may have logged this step
        # and yet not have published the result.
        self.evaluate(self._job.num_steps)
        self._state["weight_syncs"] += 1

    def evaluate(self, step: int) -> None:
        """Evaluate the weights after ``step`` steps and write the figures to the metrics.

        Raises:
            EngineError: A server has lost the weights MAX_SENDS times.
        """
        progress = f"step {step}/{self._job.num_steps}"
        # All ranks go through this loop together, because a weight sync is collective.
        for attempt in range(MAX_SENDS):
            self._student.push(step, again=attempt > 0)
            # Answers may take longer than a collective may last; run_on_first_rank bounds no wait.
            figures, lost = run_on_first_rank(self._answer)
            if not lost:
                break
            if self._metrics is not None:
                self._job.print_line(f"{progress}: {lost}; the weights are sent again")
        else:
            raise EngineError(
                f"the student's server lost its weights {MAX_SENDS} times: {lost}",
                where=f"step {step}",
                remedy="read the log of the server",
            )
        # Only rank 0 has a log. The other ranks got the same metrics from it.
        if self._metrics is not None and figures is not None:
            self._report(progress, step, figures)

    def _report(self, progress: str, step: int, figures: dict[str, Any]) -> None:
        """Write the metrics of an evaluation to their file and on the screen. Rank 0 alone."""
        assert self._metrics is not None
        stage = self._job.stage
        run_dir = self._job.config.run.dir
        # From the metrics and not from memory, so that a kill changes nothing.
        before = ((step - 1) // self._every) * self._every if step > 0 else 0
        divergence = mean_between(read_metrics(run_dir, kind="train", stage=stage), before, step)
        # Before the first step there is no mean over steps, and the line says nothing of it.
        if divergence is not None:
            figures = {**figures, TRAINING_REVERSE_KL: divergence}
        if self._answers is not None:
            write_transcripts(self._job.folder, step, self._answers.transcripts)
        self._metrics.eval(stage, step, figures)
        self._job.print_line(f"{progress}: {_told(figures, step - before)}")
        warning = rise_of(read_metrics(run_dir, kind="eval", stage=stage))
        if warning:
            self._job.print_line(f"{progress}: WARNING: {warning}")

    def _answer(self) -> tuple[dict[str, Any] | None, str]:
        """Return rank 0's metrics and "", or None and which weights answered instead."""
        if self._answers is None:
            return None, ""
        try:
            return self._answers.figures(self._student.version), ""
        except OtherWeights as error:
            # Caught on rank 0: all ranks must decide together to send the weights again.
            return None, error.what


def _told(figures: Mapping[str, Any], num_steps: int) -> str:
    """Return the metrics of an evaluation in words, each with what it was measured on."""
    parts: list[str] = []
    # A task without a verifier has no accuracy.
    if "accuracy" in figures:
        parts.append(f"accuracy {figures['accuracy']:.3f}")
    else:
        # Then lengths are what tells most of a student that goes wrong.
        parts.append(f"{figures['response_len']:,.0f} tokens a response")
        parts.append(f"{figures['truncated_share']:.0%} cut off")
    told = f"synced weights, {', '.join(parts)} on {figures['num_prompts']} prompts"
    if TRAINING_REVERSE_KL in figures:
        told += (
            f"; reverse KL {figures[TRAINING_REVERSE_KL]:.4f} on the training rollouts of the "
            f"last {num_steps} steps"
        )
    return told


def _transcript(prompt: Prompt, response: Response, text: str) -> dict[str, Any]:
    return {
        "prompt_id": response.prompt_id,
        "sample_index": response.sample_index,
        "finish_reason": response.finish_reason,
        "response_len": len(response.token_ids),
        "messages": [dict(message) for message in prompt.messages],
        "response": text,
    }


class HeldOutAnswers:
    """Answers to the same held-out prompts, with the same seeds, at every evaluation."""

    def __init__(self, config: Config, model: Path, engine: SGLangEngine) -> None:
        """Load the prompts. ``model`` is a folder with the tokenizer."""
        self._seed = config.run.seed
        self._engine = engine
        self._task = get_task(config.task.name, config.task.options)
        self._tokenizer = prompt_tokenizer(config)
        prompts, prompt_ids = load_prompts(
            config.prompts.eval,
            self._task,
            self._tokenizer,
            context_length=config.sglang.context_length,
            need_answers=True,
            time=render_time(config),
            kept=kept_in(config.run.dir, "eval"),
        )
        # The same first prompts at each evaluation, so that its metrics are those of a curve.
        count = config.distill.sync_num_prompts
        self._prompts = prompts[:count]
        self._prompt_ids = prompt_ids[:count]
        # The knobs of evaluate, so that the curve and the final figure can be compared.
        # The first answers of the newest evaluation. A reader sees how the same answers change.
        self.transcripts: list[dict[str, Any]] = []
        self._params = sampling_params(config.evaluate, config.student_token_models)
        self._num_ids = num_shared_ids(config)

    def figures(self, version: str) -> dict[str, Any]:
        """Sample one answer to every prompt and judge it.

        Args:
            version: The weight version that the servers must have.

        Returns:
            num_prompts, response_len (mean, in tokens), and truncated_share. With a verifier also
            accuracy, and accuracy_interval (95%).

        Raises:
            OtherWeights: A response carries another weight version.
        """
        # Collected on the way: most of the responses themselves are not kept.
        lengths: list[int] = []
        truncated: list[bool] = []
        # By the place of the response. Short answers come first, so the first ones to come would be
        # of other prompts each time, and no fair choice.
        shown: dict[int, dict[str, Any]] = {}
        to_show = {prompt.prompt_id for prompt in self._prompts[:NUM_SHOWN]}
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}

        def judged() -> Iterator[Judged]:
            for response in self._sampled(version):
                lengths.append(len(response.token_ids))
                truncated.append(response.finish_reason == "length")
                text = response_text(self._tokenizer, response.token_ids, response.finish_reason)
                if response.prompt_id in to_show:
                    place = len(lengths) - 1
                    shown[place] = _transcript(by_id[response.prompt_id], response, text)
                yield by_id[response.prompt_id], text, response.finish_reason

        count = len(self._prompts)
        accuracy: dict[str, Any] = {}
        if isinstance(self._task, Verifier):
            # Verdicts are made while later responses are still being sampled.
            verdicts = [*judge_all(self._task, judged())]
            share = sum(verdict.right for verdict in verdicts) / count
            for place, transcript in shown.items():
                transcript |= asdict(verdicts[place])
            accuracy = {
                "accuracy": share,
                "accuracy_interval": list(wilson_interval(share, count)),
            }
        else:
            for _ in judged():
                pass
        # In the order of the prompts, so that two evaluations can be read side by side.
        order = {prompt.prompt_id: index for index, prompt in enumerate(self._prompts)}
        self.transcripts = sorted(shown.values(), key=lambda row: order[row["prompt_id"]])
        return {
            **accuracy,
            "num_prompts": count,
            "response_len": sum(lengths) / count,
            "truncated_share": sum(truncated) / count,
        }

    def _sampled(self, version: str) -> Iterator[Response]:
        answers = self._engine.generate(self._requests(), self._params, version=version)
        # As in evaluate, whose figure closes the curve.
        return within_ids(answers, self._num_ids, title="held-out answers")

    def _requests(self) -> Iterator[SamplingRequest]:
        for prompt, ids in zip(self._prompts, self._prompt_ids, strict=True):
            # The seed does not depend on the step. Answers differ by the weights alone.
            seed = request_seed(self._seed, prompt.prompt_id, 0, "sync")
            yield SamplingRequest(prompt.prompt_id, 0, ids, seed)
