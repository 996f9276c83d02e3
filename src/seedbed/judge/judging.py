"""Answers in, figures out: each model's score with its interval, and what sets two models apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from seedbed.checkpoint import tokenizer_folder
from seedbed.judge.answers import NO_ROOM, Answer, Asking, answer_questions
from seedbed.judge.ask import Judge, Judged, ask_all, score_request, verdict_request
from seedbed.judge.questions import Question
from seedbed.judge.scores import Estimate, Outcome, differences, estimate, is_inconsistent, outcome, spread
from seedbed.judge.transcript import Transcript
from seedbed.text.tokenizer import Tokenizer

Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows that something is done so many times; gives what to tell how often it was."""

POINTS: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class Requests:
    """What became of requests to the judge, and what they cost."""

    unparsable: int = 0
    """Got replies, and none that can be read."""
    failed: int = 0
    """Got none; they are asked the next time."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class ModelScore:
    """How good a model's answers are."""

    model: str
    questions: int
    unanswered: int
    """Questions longer than the model's context."""
    exact_match: float
    """Share of the answers that have the reference's words."""
    chrf: float
    """Mean over the answers, 0 to 100."""
    scores: Mapping[str, float]
    """What the judge gives each answer, 0 to 100, by the question's id; the mean of the repeats."""
    spread: float | None
    """Standard deviation between repeats of one answer's score."""
    requests: Requests

    @property
    def score(self) -> Estimate | None:
        """The mean of the judge's scores; None without a judge."""
        return estimate(list(self.scores.values()))

    def to_json(self) -> dict[str, Any]:
        """As `metrics.json` and `--json` give it."""
        score = self.score
        return {
            "model": self.model,
            "score": score.mean if score else None,
            "low": score.low if score else None,
            "high": score.high if score else None,
            "questions": self.questions,
            "scored": len(self.scores),
            "spread": self.spread,
            "exact_match": self.exact_match,
            "chrf": self.chrf,
            "unanswered": self.unanswered,
            **asdict(self.requests),
        }


@dataclass(frozen=True)
class Preference:
    """Which of two models' answers the judge prefers."""

    outcomes: Mapping[Outcome, int]
    win_rate: Estimate | None
    """Share of the questions won, a tie as half of one."""
    inconsistent: float | None
    """Share of the verdicts that changed with the order of the answers."""
    requests: Requests

    def to_json(self) -> dict[str, Any]:
        return {
            "outcomes": {name: self.outcomes.get(name, 0) for name in POINTS},
            "win_rate": asdict(self.win_rate) if self.win_rate else None,
            "inconsistent": self.inconsistent,
            **asdict(self.requests),
        }


@dataclass(frozen=True)
class Result:
    """What was found out about a model and those it is measured against."""

    judge: str | None
    repeats: int
    scores: Mapping[str, ModelScore]
    """By model; the first is the one that all is about."""
    preference: Preference | None
    """Of the first model against another."""

    @property
    def model(self) -> ModelScore:
        return next(iter(self.scores.values()))

    def difference(self, other: str) -> Estimate | None:
        """The model's score minus another's, question by question."""
        return estimate(differences(self.model.scores, self.scores[other].scores))

    def tokens(self) -> tuple[int, int]:
        """What all replies took, those of earlier times among them: tokens read by the judge, and written by it."""
        all_requests = [score.requests for score in self.scores.values()]
        all_requests += [self.preference.requests] if self.preference else []
        return sum(r.prompt_tokens for r in all_requests), sum(r.completion_tokens for r in all_requests)


def judge_models(
    models: Mapping[str, Path],
    questions: Sequence[Question],
    asking: Asking,
    judge: Judge | None,
    folder: Path,
    counting: Counting,
    *,
    repeats: int = 1,
    against: str | None = None,
) -> Result:
    """Let models answer and a judge score what they say; everything is kept in `folder`, and read if it is there.

    `answers.jsonl` holds the answers of the first model, `others.jsonl` those of the others, `scores.jsonl` every
    reply of the judge.

    Args:
        models: folders of models by the name to show; the first is the one that all is about.
        judge: None for what needs no judge: exact match and chrF.
        repeats: how often each answer is scored.
        against: the one of `models` whose answers are also compared with the first's in pairs.

    Raises:
        JudgeError: the judge cannot be used; what it replied so far is kept.
        SeedbedError: a model cannot be loaded, a library is missing, or the disk is full.
    """
    first = next(iter(models))
    template_source = Tokenizer.load(tokenizer_folder(models[first])).chat_template
    transcripts = {name: Transcript(folder / f"{name}.jsonl") for name in ("answers", "others", "scores")}
    answers = {}
    for name, path in models.items():
        with counting(f"{name} answers", len(questions)) as on_answer:
            transcript = transcripts["answers" if name == first else "others"]
            answers[name] = answer_questions(name, path, questions, asking, transcript, on_answer, template_source)
    scores = score_answers(answers, judge, repeats, transcripts["scores"], counting)
    preference = None
    if judge and against:
        preference = prefer({name: answers[name] for name in (first, against)}, judge, transcripts["scores"], counting)
    return Result(judge.name if judge else None, repeats, {score.model: score for score in scores}, preference)


def score_answers(
    models: Mapping[str, Sequence[Answer]],
    judge: Judge | None,
    repeats: int,
    transcript: Transcript,
    counting: Counting,
) -> list[ModelScore]:
    """The score of each model; without a judge, only how near its answers are to the references.

    Args:
        models: answers by model.
        repeats: how often each answer is scored.

    Raises:
        JudgeError: the judge cannot be used; what it replied so far is in the transcript.
    """
    if judge is None:
        return [_model_score(model, answers, []) for model, answers in models.items()]
    requests = [
        score_request(answer.question, answer.text, model, repeat)
        for model, answers in models.items()
        for answer in answers
        for repeat in range(1, repeats + 1)
    ]
    with counting(f"{judge.name} scores answers", len(requests)) as on_progress:
        judged = iter(ask_all(judge, requests, transcript, on_progress))
    return [
        _model_score(model, answers, [[next(judged) for _ in range(repeats)] for _ in answers])
        for model, answers in models.items()
    ]


def prefer(
    models: Mapping[str, Sequence[Answer]], judge: Judge, transcript: Transcript, counting: Counting
) -> Preference:
    """Which of two models' answers the judge prefers; it sees each pair in both orders.

    Answers that are the same are a tie that nobody is asked about.

    Args:
        models: the answers of two models to the same questions.

    Raises:
        JudgeError: the judge cannot be used; what it replied so far is in the transcript.
    """
    names = list(models)
    pairs = list(zip(*models.values(), strict=True))
    asked = [pair for pair in pairs if pair[0].text != pair[1].text]
    requests = [
        verdict_request(a.question, [x.text for x in order], list(who))
        for a, b in asked
        for order, who in (((a, b), names), ((b, a), reversed(names)))
    ]
    with counting(f"{judge.name} compares answers", len(requests)) as on_progress:
        judged = ask_all(judge, requests, transcript, on_progress) if requests else []
    return _preference(judged, ties=len(pairs) - len(asked))


def _preference(judged: Sequence[Judged], ties: int) -> Preference:
    """From the verdicts on each pair, the first in one order and the second in the other."""
    verdicts = [
        (first.verdict, swapped.verdict)
        for first, swapped in zip(judged[::2], judged[1::2], strict=True)
        if first.verdict and swapped.verdict
    ]
    same: list[Outcome] = ["tie"] * ties
    outcomes = [*(outcome(*pair) for pair in verdicts), *same]
    return Preference(
        outcomes=Counter(outcomes),
        win_rate=estimate([POINTS[one] for one in outcomes]),
        inconsistent=fmean([is_inconsistent(*pair) for pair in verdicts]) if verdicts else None,
        requests=_requests(judged),
    )


def _model_score(model: str, answers: Sequence[Answer], judged: Sequence[Sequence[Judged]]) -> ModelScore:
    repeats = [[one.score for one in several if one.score is not None] for several in judged]
    scored = zip(answers, repeats, strict=True) if judged else ()
    return ModelScore(
        model=model,
        questions=len(answers),
        unanswered=sum(answer.finish_reason == NO_ROOM for answer in answers),
        exact_match=fmean(answer.exact_match for answer in answers),
        chrf=fmean(answer.chrf for answer in answers),
        scores={answer.question.id: fmean(scores) for answer, scores in scored if scores},
        spread=spread(repeats),
        requests=_requests([one for several in judged for one in several]),
    )


def _requests(judged: Sequence[Judged]) -> Requests:
    return Requests(
        unparsable=sum(one.replied and not one.is_usable for one in judged),
        failed=sum(not one.replied for one in judged),
        prompt_tokens=sum(one.prompt_tokens for one in judged),
        completion_tokens=sum(one.completion_tokens for one in judged),
    )
