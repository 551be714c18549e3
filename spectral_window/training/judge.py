"""Scores of a model on the tasks of lm-evaluation-harness (the extra `judge`).

lm-eval asks for log-likelihoods and for text; its own model class for transformers answers, with
three differences. A context is as long as `max_length` says and not as a field of the config, for a
state of constant size has no limit of its own. Text is encoded as in training: a document begins
with its token, and special tokens that stand in a text are plain characters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_window.errors import NetworkError, UserError
from spectral_window.training.loading import Loaded

UNLIMITED = 2**31 - 1  # tokens


def judge(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    max_length: int | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Measure a model on tasks.

    Args:
        loaded: the model and its tokenizer.
        tasks: names that lm-eval knows, or paths of its .yaml files.
        max_length: tokens of a question with its answer, the last ones of longer ones; None for
            all.
        limit: ask only so many questions of each task; None for all.
        batch: questions at a time.

    Returns:
        What lm-eval's `simple_evaluate` returns: "results" by task, "n-samples", "samples", ...

    Raises:
        UserError: lm-eval is not installed, or there is no such task.
        NetworkError: a task's data cannot be fetched.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "tasks are asked by lm-eval (--tasks): pip install 'spectral-window[judge]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise UserError(f"no such task file ({task}): give the .yaml of a task")
    named = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=bool(named))  # to read all of them takes seconds
    missing = [task for task in named if not manager.match_tasks([task])]
    if missing:
        raise UserError(f"no such task ({', '.join(missing)}): `lm-eval ls tasks` lists them")
    try:
        return lm_eval.simple_evaluate(
            model=_answerer(loaded, max_length, batch),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
        )
    except (ConnectionError, TimeoutError) as error:
        raise NetworkError(
            f"a task's data cannot be fetched ({', '.join(tasks)}): {_one_line(error)}"
        ) from None
    except (KeyError, ValueError, FileNotFoundError) as error:  # a bad file, or missing data
        raise UserError(
            f"the task cannot be run ({', '.join(tasks)}): {_one_line(error)}"
        ) from None


def _answerer(loaded: Loaded, max_length: int | None, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Answerer(HFLM):
        """lm-eval's model class, which encodes as this package does."""

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **_: Any,
        ) -> list[int]:
            ids = self.tokenizer(
                string, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            context_ids, continuation_ids = super()._encode_pair(context, continuation)
            return [self.prefix_token_id, *context_ids], continuation_ids

        def tok_batch_encode(self, strings: list[str], *given: Any, **named: Any) -> Any:
            begin = self.tokenizer.decode([self.prefix_token_id])
            return super().tok_batch_encode([begin + text for text in strings], *given, **named)

    return Answerer(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=max_length or UNLIMITED,
        batch_size=batch,
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
