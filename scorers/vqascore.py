"""How surely a vision language model says yes: VQAScore of a prompt, or the questions of compositional benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from diffalign.errors import UserError
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

from ._http import NoAnswer
from ._openai import Endpoint, Part, picture, words, yes_probability

Metric = Literal["prompt", "product", "dpg"]
INSTRUCTIONS = {
    "prompt": 'Does this figure show "{prompt}"? Please answer yes or no.',
    "product": "{question} Please answer yes or no.",
    "dpg": "{question} Please answer yes or no.",
}


def build(
    base_url: str,
    model: str,
    metric: Metric = "prompt",
    instruction: str | None = None,
    key_env: str | None = None,
    timeout: float = 60.0,
    budget: float = 300.0,
    workers: int = 8,
    options: dict[str, Any] | None = None,
) -> Scorer:
    """P(yes) from the log-probs of the first token, normalised over yes and no; 0 to 1.

    Args:
        base_url: of an OpenAI-compatible server, with ``/v1``.
        metric: ``prompt``: does the picture show it (arXiv:2404.01291). ``product``: of the answers to
            ``meta.questions``, as BLIP-VQA does in T2I-CompBench (arXiv:2307.06350). ``dpg``: the share of yes among
            ``meta.questions``, where a question counts as no once one that it depends on (``meta.dependency``, a list
            of positions for each) does, in their order, as the release of DPG-Bench has it (arXiv:2403.05135).
        instruction: what is asked, with ``{prompt}`` or ``{question}`` in it.
        key_env: environment variable with the key of the server.
        timeout: seconds of one request.
        budget: seconds without any answer after which items are failures of kind ``remote``.
        workers: questions that are asked at the same time.
        options: keys of the request to add or, with null, to leave out.

    The number is that of the model that is asked: name it when you report it.
    """
    asked = INSTRUCTIONS[metric] if instruction is None else instruction
    hole = "{prompt}" if metric == "prompt" else "{question}"
    if hole not in asked:
        raise UserError(f"instruction: needs {hole} in it for metric {metric!r}")
    endpoint = Endpoint(
        base_url, model, key_env=key_env, timeout=timeout, budget=budget, workers=workers, options=options
    )
    return _VqaScore(endpoint, metric, asked)


@dataclass(frozen=True, slots=True)
class _VqaScore:
    endpoint: Endpoint
    metric: Metric
    instruction: str
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        asked = [_questions(self.metric, sample) for sample in samples]
        pictures = [picture(sample.image) for sample in samples if sample.image is not None]
        todo = [
            (pictures[n], self.instruction.replace("{prompt}", samples[n].prompt).replace("{question}", question))
            for n, questions in enumerate(asked)
            if not isinstance(questions, Failure)
            for question in questions
        ]
        answers = iter(self.endpoint.each(self._ask, todo))
        found: list[Outcome] = []
        for sample, questions in zip(samples, asked, strict=True):
            if isinstance(questions, Failure):
                found.append(questions)
            else:
                found.append(self._score(sample, [next(answers) for _ in questions]))
        return found

    def _ask(self, question: tuple[Part, str]) -> float | Failure:
        shown, text = question
        try:
            choice = self.endpoint.ask([shown, words(text)], max_tokens=1, logprobs=True, top_logprobs=20)
            return yes_probability(choice)
        except NoAnswer as error:
            return Failure("remote", str(error))

    def _score(self, sample: Sample, answers: Sequence[float | Failure]) -> Outcome:
        lost = next((answer for answer in answers if isinstance(answer, Failure)), None)
        if lost is not None:
            return lost
        yes = [answer for answer in answers if not isinstance(answer, Failure)]
        if self.metric == "prompt":
            return Score(yes[0])
        if self.metric == "product":
            return Score(math.prod(yes), detail={"yes": yes})
        counted = dpg_answers([answer > 0.5 for answer in yes], sample.meta["dependency"])
        return Score(fmean(counted), detail={"yes": yes, "counted": counted})


def dpg_answers(answers: Sequence[bool], dependency: Sequence[Sequence[int]]) -> list[bool]:
    """The answers that count: a question is no once one that it depends on is, in their order.

    Args:
        dependency: of every question, the positions of those that it depends on.
    """
    counted = list(answers)
    for index, parents in enumerate(dependency):
        counted[index] = counted[index] and all(counted[parent] for parent in parents)
    return counted


def _questions(metric: Metric, sample: Sample) -> list[str] | Failure:
    """What is asked about a sample."""
    if metric == "prompt":
        return [sample.prompt]
    questions = sample.meta.get("questions")
    if not isinstance(questions, list) or not questions or not all(isinstance(one, str) for one in questions):
        return Failure("input", f"meta.questions: metric {metric!r} needs a list of questions")
    if metric == "dpg" and not _is_dependency(sample.meta, len(questions)):
        return Failure("input", "meta.dependency: expected the positions of its parents for every question")
    return questions


def _is_dependency(meta: Mapping[str, Any], count: int) -> bool:
    found = meta.get("dependency")
    return (
        isinstance(found, list)
        and len(found) == count
        and all(isinstance(parents, list) for parents in found)
        and all(type(parent) is int and 0 <= parent < count for parents in found for parent in parents)
    )
