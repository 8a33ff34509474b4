"""Multiple choice: the option with the highest log-likelihood, or that which a generated answer names (MMMU, arXiv 2311.16502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from compress.data.sources import Columns
from compress.errors import DataError
from compress.eval.definition import Kind
from compress.eval.full_vocabulary import compare_full_vocabulary
from compress.eval.metrics.letter import LETTERS, named_option
from compress.eval.results import QuestionItem
from compress.eval.tasks.question_task import QuestionSet, QuestionTask, ScoredAnswer, Scorer, look_count
from compress.eval.tasks.task import TaskContext, score_passages, score_twice
from compress.runtimes.runtime import Answer, Capability, Generates, Passage, Score, Scores

if TYPE_CHECKING:
    from compress.data.questions import Question


class Choice(QuestionTask):
    """Questions about images with options, of which one is right."""

    task_revision: ClassVar[int] = 1
    kind: ClassVar[Kind] = "choice"

    task: Literal["choice"]
    by: Literal["likelihood", "generation"]
    """`generation` parses the generated answer for an option. `likelihood` scores each option as the answer, its letter where the
    prompt shows the options and its text where it does not, and takes the one with the highest log-likelihood."""

    length_normalized: bool = False
    """By likelihood: takes the highest log-likelihood per token."""

    @model_validator(mode="after")
    def _check_scoring(self) -> Self:
        if self.by == "generation" and self.length_normalized:
            raise ValueError("length_normalized is of by: likelihood; remove it, or write by: likelihood")
        if self.by == "generation" and not self._shows_options():
            raise ValueError("the definition's prompt does not show the {options}; add them there, or write by: likelihood")
        return self

    @property
    def needs(self) -> tuple[Capability, ...]:
        """Log-probabilities of given tokens where options are scored by likelihood, else generated text."""
        return (Scores,) if self.by == "likelihood" else (Generates,)

    @property
    def metric_name(self) -> str:
        """The name of the score in reports: how an option is chosen."""
        return "likelihood" if self.by == "likelihood" else self.resolved_definition().metric

    def prompt_text(self, question: Question) -> str:
        """Return the prompt with the question's options, a line each, as `A. text`."""
        lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False))
        return self.resolved_definition().format_prompt(question.question, "\n".join(lines))

    def accepted(self, question: Question) -> tuple[str, ...]:
        """Return the letter of the right option; see `QuestionTask.accepted`."""
        return (LETTERS[self.right_option(question)],)

    def right_option(self, question: Question) -> int:
        """Return the index of the right option.

        Raises:
            DataError: the data name none, or more than one; the message goes on after the question's name.
        """
        option_count = len(question.options)
        if not 2 <= option_count <= len(LETTERS):
            raise DataError(f"has {option_count} options, and a choice is of 2 to {len(LETTERS)}; correct them or remove the row")
        label_kind, answer = self.resolved_definition().labels, question.answers[0] if len(question.answers) == 1 else None
        names = {
            "letter": LETTERS[:option_count],
            "index": tuple(map(str, range(option_count))),
            "text": question.options,
        }[label_kind]
        # Exactly once: of two options with the same text, the label would not say which is right.
        if answer is None or list(names).count(answer) != 1:
            answers = ", ".join(map(repr, question.answers)) or "nothing"
            raise DataError(
                f"has {answers} as its answer, not the {label_kind} of one of its {option_count} options; correct it, or labels"
            )
        return names.index(answer)

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return a function that is 1 where the option that an answer names is the right one; see `QuestionTask.scorer`."""
        del questions
        return lambda question, answer: float(named_option(answer, question.options) == self.right_option(question))

    def same(self, answer: str, other: str) -> bool:
        """Return whether two answers are equal up to surrounding whitespace."""
        return answer.strip() == other.strip()

    def note(self) -> str:
        """Return how an option is chosen."""
        definition, sampled = self.resolved_definition(), self.drawn_note()
        prompt_note = self.prompt_note()
        if self.by == "generation":
            return (
                f"share of questions{sampled} whose answer names the right option: its text, or the last letter (MMMU); greedy, at "
                f"most {definition.max_new_tokens} tokens, {prompt_note}; KL and top-1 are of the original's own answers"
            )
        scored_text = "letter" if self._shows_options() else "text"
        per_token = " per token" if self.length_normalized else ""
        return (
            f"share of questions{sampled} of whose options the right one's {scored_text} has the highest log-likelihood{per_token} "
            f"as the answer; {prompt_note}; KL and top-1 are of the option that the original finds likeliest"
        )

    def ask(self, question_set: QuestionSet, context: TaskContext) -> list[ScoredAnswer]:
        """Generate answers to the questions, or score their options; see `QuestionTask.ask`."""
        if self.by == "generation":
            return super().ask(question_set, context)
        passages = self._option_passages(question_set, context)
        answered = self._most_likely(question_set, score_passages(context, question_set.name, passages), passages)
        by_id = {passage.id: passage for passage in passages}
        original_options = [
            by_id[f"{item.id}#{self._original_letter(question_set, index, item)}"] for index, (item, _) in enumerate(answered)
        ]
        scores = compare_full_vocabulary(
            context, question_set.name, original_options, [score for _, score in answered], look_count(context)
        )
        return [(item, score) for (item, _), score in zip(answered, scores, strict=True)]

    def ask_again(self, question_set: QuestionSet, context: TaskContext) -> list[ScoredAnswer]:
        """Generate the answers, or score the options, once more; see `QuestionTask.ask_again`."""
        if self.by == "generation":
            return super().ask_again(question_set, context)
        passages = self._option_passages(question_set, context)
        return self._most_likely(question_set, score_twice(context, question_set.name, passages), passages)

    def _default_columns(self) -> Columns:
        return Columns(options="options")

    def _shows_options(self) -> bool:
        return "{options}" in self.resolved_definition().prompt

    def _option_passages(self, question_set: QuestionSet, context: TaskContext) -> list[Passage]:
        """Return each option as an answer to its question's prompt, in the questions' order."""
        from compress.data.prompts import load_tokenizer
        from compress.data.windows import encoder

        encode = encoder(load_tokenizer(context.original_checkpoint))
        passages = list[Passage]()
        for question, prompt in zip(question_set.questions, self.prompts(question_set), strict=True):
            # Letters where the prompt shows the options: they are equally long, so that no length decides.
            texts = list(LETTERS[: len(question.options)]) if self._shows_options() else list(question.options)
            for letter, token_ids in zip(LETTERS, encode(texts), strict=False):
                if not token_ids:
                    raise DataError(
                        f"{self.location(question)}: option {letter} is empty; write its text, or show {{options}} in the prompt"
                    )
                passages.append(Passage(id=f"{question.id}#{letter}", token_ids=tuple(token_ids), prompt=prompt))
        return passages

    def _most_likely(self, question_set: QuestionSet, scores: Sequence[Score], passages: Sequence[Passage]) -> list[ScoredAnswer]:
        """Return each question's item with the most likely option, and the token scores of the option that the original chose."""
        answered = list[ScoredAnswer]()
        start = 0
        for index, question in enumerate(question_set.questions):
            options = slice(start, start := start + len(question.options))
            option_scores, tokens = scores[options], [passage.token_ids for passage in passages[options]]
            # One option without a score makes the question unanswered: the others' argmax would be biased against it.
            fault = next((score.fault for score in option_scores if score.fault), None)
            best = 0 if fault else int(np.argmax([self._likelihood(score) for score in option_scores]))
            # KL is taken along the original's choice for every artifact: along each one's own it would be of different tokens.
            original_best = best if question_set.original is None else self._option_index(question_set.original[index])
            answer = Answer(id=question.id, text="" if fault else LETTERS[best], token_ids=(), fault=fault)
            score = replace(option_scores[original_best], id=question.id)
            item = self._item(question_set, question, answer, tokens[original_best], score)
            right = not fault and best == self.right_option(question)
            answered.append((item.model_copy(update={"score": float(right)}), score))
        return answered

    def _likelihood(self, score: Score) -> float:
        log_likelihood = -float(score.negative_log_likelihood.sum())
        return log_likelihood / len(score.negative_log_likelihood) if self.length_normalized else log_likelihood

    def _original_letter(self, question_set: QuestionSet, index: int, item: QuestionItem) -> str:
        """Return the letter of the option that is the original's most likely."""
        original = item if question_set.original is None else question_set.original[index]
        return LETTERS[self._option_index(original)]

    def _option_index(self, item: QuestionItem) -> int:
        return LETTERS.index(item.said) if item.said else 0
