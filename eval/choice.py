"""Multiple choice: which of a question's options a model finds likeliest, or names in its own words (MMMU, arXiv 2311.16502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from compress.calibration.sets import Columns
from compress.errors import DataError
from compress.eval.asked import Answered, Asked, QuestionSet, Scorer, drawn, parts_of
from compress.eval.definition import Kind
from compress.eval.metrics.letter import LETTERS, named_option
from compress.eval.results import QuestionItem
from compress.eval.task import TaskContext, score_again, score_passages
from compress.eval.whole import compare_whole
from compress.runtimes.runtime import Ability, Answer, Passage, Score

if TYPE_CHECKING:
    from compress.calibration.questions import Question


class Choice(Asked):
    """Questions about images with options, of which one is right.

    `by: generation` lets the model answer and looks which option it names. `by: likelihood` scores each option as the answer,
    its letter where the prompt shows the options and its text where it does not, and takes the likeliest; with
    `length_normalized`, the one with the highest log-likelihood per token.
    """

    task_revision: ClassVar[int] = 1
    kind: ClassVar[Kind] = "choice"

    task: Literal["choice"]
    by: Literal["likelihood", "generation"]
    length_normalized: bool = False

    @model_validator(mode="after")
    def _check_way(self) -> Self:
        if self.by == "generation" and self.length_normalized:
            raise ValueError("length_normalized is of by: likelihood; remove it, or write by: likelihood")
        if self.by == "generation" and not self._shows_options():
            raise ValueError("the definition's prompt does not show the {options}; add them there, or write by: likelihood")
        return self

    @property
    def needs(self) -> Ability:
        """A model that gives the likelihoods of given tokens where these choose, else one that writes text."""
        return "scores" if self.by == "likelihood" else "text"

    @property
    def scored_by(self) -> str:
        """What reports call the score: how an option is chosen."""
        return "likelihood" if self.by == "likelihood" else self.read().metric

    def wording(self, question: Question) -> str:
        """Return the question with its options, a line each, as `A. text`."""
        lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False))
        return self.read().ask(question.question, "\n".join(lines))

    def accepted(self, question: Question) -> tuple[str, ...]:
        """Return the letter of the right option; see `Asked.accepted`."""
        return (LETTERS[self.right_option(question)],)

    def right_option(self, question: Question) -> int:
        """Return the place of the right option.

        Raises:
            DataError: the data name none, or more than one; without the question's name.
        """
        count = len(question.options)
        if not 2 <= count <= len(LETTERS):
            raise DataError(f"has {count} options, and a choice is of 2 to {len(LETTERS)}; correct them or remove the row")
        labels, given = self.read().labels, question.answers[0] if len(question.answers) == 1 else None
        known = {
            "letter": LETTERS[:count],
            "index": tuple(map(str, range(count))),
            "text": question.options,
        }[labels]
        if given is None or list(known).count(given) != 1:
            said = ", ".join(map(repr, question.answers)) or "nothing"
            raise DataError(f"has {said} as its answer, not the {labels} of one of its {count} options; correct it, or labels")
        return known.index(given)

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return whether the option that an answer names is the right one; see `Asked.scorer`."""
        del questions
        return lambda question, said: float(named_option(said, question.options) == self.right_option(question))

    def same(self, said: str, other: str) -> bool:
        """Return whether two answers are the same text, but for what stands around it."""
        return said.strip() == other.strip()

    def note(self) -> str:
        """Return how an option is chosen."""
        definition, sampled = self.read(), drawn(self.samples, self.seed)
        asked = self.asked_as()
        if self.by == "generation":
            return (
                f"share of questions{sampled} whose answer names the right option: its text, or the last letter (MMMU); greedy, at "
                f"most {definition.max_new_tokens} tokens, {asked}; KL and top-1 are of the original's own answers"
            )
        what = "letter" if self._shows_options() else "text"
        each = " per token" if self.length_normalized else ""
        return (
            f"share of questions{sampled} of whose options the right one's {what} has the highest log-likelihood{each} as the "
            f"answer; {asked}; KL and top-1 are of the option that the original finds likeliest"
        )

    def ask(self, part: QuestionSet, context: TaskContext) -> list[Answered]:
        """Ask a part's questions, or score their options; see `Asked.ask`."""
        if self.by == "generation":
            return super().ask(part, context)
        passages = self._options(part, context)
        answered = self._likeliest(part, score_passages(context, part.name, passages), passages)
        by_id = {passage.id: passage for passage in passages}
        theirs = [by_id[f"{item.id}#{self._theirs(part, place, item)}"] for place, (item, _) in enumerate(answered)]
        scores = compare_whole(context, part.name, theirs, [score for _, score in answered], parts_of(context))
        return [(item, score) for (item, _), score in zip(answered, scores, strict=True)]

    def ask_again(self, part: QuestionSet, context: TaskContext) -> list[Answered]:
        """Ask a part's questions, or score their options, once more; see `Asked.ask_again`."""
        if self.by == "generation":
            return super().ask_again(part, context)
        passages = self._options(part, context)
        return self._likeliest(part, score_again(context, part.name, passages), passages)

    def _usual_columns(self) -> Columns:
        return Columns(options="options")

    def _shows_options(self) -> bool:
        return "{options}" in self.read().prompt

    def _options(self, part: QuestionSet, context: TaskContext) -> list[Passage]:
        """Return each question's options as answers to its prompt, question by question."""
        from compress.calibration.collect import encoder
        from compress.conversation import load_tokenizer

        encode = encoder(load_tokenizer(context.original))
        passages = list[Passage]()
        for question, prompt in zip(part.questions, self.prompts(part), strict=True):
            texts = list(LETTERS[: len(question.options)]) if self._shows_options() else list(question.options)
            for letter, token_ids in zip(LETTERS, encode(texts), strict=False):
                if not token_ids:
                    where = f"task {self.name}: {question.origin}: question {question.id}"
                    raise DataError(f"{where}: option {letter} is empty; write its text, or show {{options}} in the prompt")
                passages.append(Passage(id=f"{question.id}#{letter}", token_ids=tuple(token_ids), prompt=prompt))
        return passages

    def _likeliest(self, part: QuestionSet, scores: Sequence[Score], passages: Sequence[Passage]) -> list[Answered]:
        """Return each question's item with the likeliest option, and how the option that the original chose was predicted."""
        answered = list[Answered]()
        first = 0
        for place, question in enumerate(part.questions):
            options = slice(first, first := first + len(question.options))
            own, tokens = scores[options], [passage.token_ids for passage in passages[options]]
            fault = next((score.fault for score in own if score.fault), None)
            chosen = 0 if fault else int(np.argmax([self._likelihood(score) for score in own]))
            theirs = chosen if part.original is None else self._place(part.original[place])
            answer = Answer(id=question.id, text="" if fault else LETTERS[chosen], token_ids=(), fault=fault)
            score = replace(own[theirs], id=question.id)
            item = self._item(part, question, answer, tokens[theirs], score)
            right = not fault and chosen == self.right_option(question)
            answered.append((item.model_copy(update={"score": float(right)}), score))
        return answered

    def _likelihood(self, score: Score) -> float:
        total = -float(score.negative_log_likelihood.sum())
        return total / len(score.negative_log_likelihood) if self.length_normalized else total

    def _theirs(self, part: QuestionSet, place: int, item: QuestionItem) -> str:
        """Return the letter of the option that the original finds likeliest."""
        original = item if part.original is None else part.original[place]
        return LETTERS[self._place(original)]

    def _place(self, item: QuestionItem) -> int:
        return LETTERS.index(item.said) if item.said else 0
