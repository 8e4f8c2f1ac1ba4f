"""What the questions that were asked tell about the object, by hand and beside the other players."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import make_sampler, tiny_llama
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.evaluation.asking import ASKED, FIXED, GREEDY, RANDOM_QUESTIONS, AskedQuestions
from attention_rl_trainer.evaluation.evaluate import EvaluationOptions, evaluate
from attention_rl_trainer.memories.loading import MemoryLoader, ReadingOptions
from attention_rl_trainer.memories.stream import Entries
from attention_rl_trainer.memories.tables import EntriesTable
from attention_rl_trainer.memories.tokenization import PlainTextEncoder

# Four objects: the first question halves them, the second too and across, the third tells nothing.
ANSWERS = {"dog": "yyn", "cat": "ynn", "car": "nyn", "bus": "nnn"}
KEYS = (" Is it alive?", " Is it loud?", " Is it a number?")


def game() -> EntriesTable:
    rows = [Entries(name, "game", KEYS, tuple(answers)) for name, answers in ANSWERS.items()]
    return EntriesTable("game", tuple(rows))


def test_by_hand() -> None:
    questions = AskedQuestions.of(game())
    assert questions is not None
    gains = questions.gains(0, [2, 0, 1], [0, 2], (1, 2))
    assert gains[ASKED] == pytest.approx(math.log(2))
    assert gains[FIXED] == gains[GREEDY] == pytest.approx(math.log(4))
    # Two of three questions: one pair of three tells all, the others half.
    assert math.log(2) < gains[RANDOM_QUESTIONS] < math.log(4)
    assert questions.gains(0, [2, 0, 1], [0, 1], (1, 2))[ASKED] == pytest.approx(math.log(4))
    assert questions.gains(3, [2, 1], [2], (1, 2)) == pytest.approx(
        {ASKED: 0, RANDOM_QUESTIONS: gains_of_one_of(questions), FIXED: math.log(2), GREEDY: math.log(2)}
    )


def gains_of_one_of(questions: AskedQuestions) -> float:
    return questions.gains(3, [2, 1], [1], (1, 2))[RANDOM_QUESTIONS]


def test_a_question_that_is_not_in_the_memory_is_asked_by_nobody() -> None:
    questions = AskedQuestions.of(game())
    assert questions is not None
    for name, told in questions.gains(1, [0, 2], [2], (5,)).items():
        assert told <= math.log(2) + 1e-9, name


def test_memories_whose_questions_differ_are_no_game() -> None:
    rows = [Entries(f"place {n}", "book", (f" Town {n}:", f" River {n}:"), ("a", "b")) for n in range(4)]
    assert AskedQuestions.of(EntriesTable("book", tuple(rows))) is None
    assert AskedQuestions.of([{"text": "an article"}]) is None


def test_an_unknown_answer_has_another_number_than_its_question() -> None:
    rows = [*game().rows[:3], Entries("bus", "game", (KEYS[0], KEYS[2]), ("n", "n"))]
    questions = AskedQuestions.of(EntriesTable("game", tuple(rows)))
    assert questions is not None
    # Its pair 1 is the third question, which tells nothing.
    assert questions.gains(3, [0, 1], [1], (1,))[ASKED] == pytest.approx(0)


def test_an_evaluation_has_the_table(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    table = game()
    options = ReadingOptions(num_kv_pairs=3, subset_fraction=0.7, tokens_per_key=8, tokens_per_value=4)
    loader = MemoryLoader(options, PlainTextEncoder(tokenizer), 0)
    batches = [
        inputs["memories"] for inputs in loader.batches(loader.evaluation_stream(table, num_epochs=2), batch_size=4)
    ]
    sampler = make_sampler(
        tiny_llama(), tokenizer, num_steps=1, num_kv_pairs=3, subset_fraction=0.7, tokens_per_key=8, tokens_per_value=4
    )
    evaluation = EvaluationOptions(eval_episodes=8, eval_order_episodes=2)
    given = sampler, batches, PlainTextEncoder(tokenizer), evaluation
    found, tables = evaluate(*given, questions=AskedQuestions.of(table))
    assert tables is not None
    assert 0 <= found["questions_tell"] <= math.log(2) + 1e-6
    text = tables.to_markdown()
    assert "| greedy player |" in text
    assert "| random questions |" in text
    plain, _ = evaluate(*given)
    assert "questions_tell" not in plain
    assert torch.tensor(plain["reward"]) == torch.tensor(found["reward"])
