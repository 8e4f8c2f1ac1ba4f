"""A language with a planted signal: topics, of which some are worth asking for, and one that must be read first.

An article is nine pairs. A key is the two-word name of a topic, a value one symbol out of 64. Pair 0 is always of
the example topic; the other eight pairs, one of each topic, are in random order:

=========== ====== ================================================================================
role        topics value
=========== ====== ================================================================================
related     3      one random symbol, new in every article and the same for all three: noise until one of
                   them was read, which reveals the other two
predictable 2      one of sixteen symbols that the topic has in every article
noise       3      a random symbol
=========== ====== ================================================================================

A reader who knows the language predicts a value the better, the better the query named its topic. With three values to
read the best plan is the three related topics, in any order: its first step earns no more than noise does, less than
a predictable topic would, and the next two earn most.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.rollout.layout import QUERY_SEPARATOR, RESPONSE_SEPARATOR, Layout, Separators

NUM_TOPICS, NUM_SYMBOLS = 8, 64
EXAMPLE_TOPIC = NUM_TOPICS
RELATED, PREDICTABLE, NOISE = (0, 1, 2), (3, 4), (5, 6, 7)
NAME_LENGTH, VALUE_LENGTH = 2, 1
NUM_STEPS = 3
# A reader cannot be certain that a query named the pair that was drawn: so often, in what it is taught, it did not.
MISMATCH = 0.1

_UNKNOWN, _QUERY, _RESPONSE = 0, 1, 2
_FIRST_NAME = 3
_SECOND_NAME = _FIRST_NAME + NUM_TOPICS + 1
_SYMBOL = _SECOND_NAME + NUM_TOPICS + 1
VOCABULARY_SIZE = _SYMBOL + NUM_SYMBOLS
LAYOUT = Layout(Separators((_QUERY,), (_RESPONSE,)), NUM_STEPS, NAME_LENGTH, NAME_LENGTH, VALUE_LENGTH)
"""Of a trajectory; what the base model is taught has a step for each topic."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the language's words; whatever is not one of them becomes ``unknown``."""
    words = ["unknown", QUERY_SEPARATOR.strip(), RESPONSE_SEPARATOR.strip()]
    words += [f"{first}{topic}" for first in ("topic", "part") for topic in range(NUM_TOPICS + 1)]
    words += [f"symbol{number}" for number in range(NUM_SYMBOLS)]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[_UNKNOWN]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]  # not annotated upstream


def topic_names() -> Tensor:
    """Return every topic's name, the example topic's last, ``[topics + 1, 2]`` int64."""
    topics = torch.arange(NUM_TOPICS + 1)
    return torch.stack([_FIRST_NAME + topics, _SECOND_NAME + topics], dim=1)


def topic_values(count: int, generator: np.random.Generator) -> Tensor:
    """Draw every topic's value in some articles, ``[count, topics + 1, 1]`` int64, the example topic's last."""
    symbols: NDArray[np.int64] = generator.integers(0, NUM_SYMBOLS, (count, NUM_TOPICS + 1, VALUE_LENGTH))
    symbols[:, RELATED] = symbols[:, RELATED[:1]]
    # A quarter of the symbols for each of the two, its own.
    symbols[:, PREDICTABLE] = symbols[:, PREDICTABLE] // 4 * 4 + np.array([[0], [2]])
    return torch.from_numpy(symbols) + _SYMBOL


def article_values(count: int, seed: int) -> Tensor:
    """Return the values of the articles that `write_articles` writes, ``[count, topics + 1, 1]`` int64."""
    return topic_values(count, np.random.default_rng([seed, 0]))


def write_articles(count: int, seed: int) -> list[dict[str, str]]:
    """Write articles with values and orders of a seed, as rows of a data set."""
    tokenizer, names, values = build_tokenizer(), topic_names(), article_values(count, seed)
    generator = np.random.default_rng([seed, 1])
    rows = []
    for number in range(count):
        order = [EXAMPLE_TOPIC, *generator.permutation(NUM_TOPICS).tolist()]
        ids = torch.cat([torch.cat([names[topic], values[number, topic]]) for topic in order])
        text = " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))
        rows.append({"title": f"article {number}", "text": text})
    return rows


def prompt_of(values: Tensor) -> Tensor:
    """Lay out the example, of every topic's values ``[n, topics + 1, 1]``, and a query separator, ``[n, 6]``."""
    rows = len(values)
    name = topic_names()[EXAMPLE_TOPIC].expand(rows, -1)
    query, response = (torch.full((rows, 1), separator) for separator in (_QUERY, _RESPONSE))
    return torch.cat([query, name, response, values[:, EXAMPLE_TOPIC], query], dim=1)


def step_of(names: Tensor, values: Tensor) -> Tensor:
    """Lay out queries ``[n, 2]``, responses of values ``[n, 1]``, and the separator of the next query, ``[n, 5]``."""
    query, response = (torch.full((len(names), 1), separator) for separator in (_QUERY, _RESPONSE))
    return torch.cat([names, response, values, query], dim=1)


def draw_sequences(count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw what the base model is taught: every topic asked for once, in random order, and a value after each.

    With probability `MISMATCH` a value is that of another topic.

    Returns:
        The sequences, ``[count, 6 + 5 · topics]`` int64, and the topics asked for, ``[count, topics]`` int64.
    """
    values = topic_values(count, generator)
    asked = torch.from_numpy(generator.permuted(np.tile(np.arange(NUM_TOPICS), (count, 1)), axis=1))
    other = (asked + torch.from_numpy(generator.integers(1, NUM_TOPICS, asked.shape))) % NUM_TOPICS
    is_mismatch = torch.from_numpy(generator.random(asked.shape) < MISMATCH)
    read = torch.where(is_mismatch, other, asked)
    rows, names = torch.arange(count), topic_names()
    steps = [step_of(names[asked[:, step]], values[rows, read[:, step]]) for step in range(NUM_TOPICS)]
    return torch.cat([prompt_of(values), *steps], dim=1), asked
