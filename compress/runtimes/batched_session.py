"""Answers of a model in this process, in batches of prompts of similar length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from compress.data.prompts import Prompt
from compress.progress import Progress
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.runtime import Answer


class BatchedSession(ABC):
    """A generative model loaded in this process."""

    # Resuming keeps whole blocks: batch composition changes the last bits, so that half a block answered again may differ.
    block: int | None = 64

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; see `Generates.answer`.

        A prompt that exceeds the model's context length or image count, or has an image that cannot be decoded, has a fault.

        Raises:
            CheckpointError: the artifact cannot be run.
            MissingError: there is too little memory.
        """
        answers: dict[int, Answer] = {}
        faults: dict[int, str] = {}

        def add(index: int, answer: Answer) -> None:
            answers[index] = answer
            if on_answer is not None:
                on_answer(answer)

        with progress.task("answer", len(prompts), "prompts") as advance:
            for batch in self.encoder.prompts(prompts, max_new_tokens, faults):
                for sample, ids in zip(batch, self._generate(batch, max_new_tokens), strict=True):
                    add(sample.index, Answer(id=prompts[sample.index].id, text=self.decode(ids), token_ids=tuple(ids)))
                advance(len(batch))
            for index, fault in faults.items():
                add(index, Answer(id=prompts[index].id, text="", token_ids=(), fault=fault))
            advance(len(faults))
        return [answers[index] for index in range(len(prompts))]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""
        return str(self.encoder.processor.tokenizer.decode(token_ids, skip_special_tokens=True))

    @abstractmethod
    def _generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, without its end-of-sequence token."""
