"""Rerank what a retriever found, by the order in which a trained adapter reads it.

Two callables with the methods that LangChain and LlamaIndex call; neither library is needed here, and what they return
are the objects that they were given. Both keep the ``top_n`` pieces that are read first.

    python examples/rerank.py out/demo "Who built the tower?" passage_1.txt passage_2.txt passage_3.txt

LangChain (a step of a chain, or the compressor of a `ContextualCompressionRetriever` after subclassing its base class):

    rerank = LangChainReranker(AttentionGuidedOrderer.from_pretrained("out/demo"), top_n=3)
    rerank.compress_documents(retriever.invoke(question), question)

LlamaIndex (a node postprocessor):

    rerank = LlamaIndexReranker(AttentionGuidedOrderer.from_pretrained("out/demo"), top_n=3)
    rerank.postprocess_nodes(retriever.retrieve(question), query_str=question)
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attention_rl_trainer import AttentionGuidedOrderer


def reranked(
    orderer: AttentionGuidedOrderer,
    items: Sequence[Any],
    text_of: Callable[[Any], str],
    question: str,
    top_n: int | None = None,
) -> list[Any]:
    """Order items by their texts, after a question; those whose text is empty come last."""
    filled = [item for item in items if text_of(item).strip()]
    empty = [item for item in items if not text_of(item).strip()]
    if not filled:
        return empty[:top_n]
    order = orderer.order([text_of(item) for item in filled], question.strip() or None, top_k=top_n).order
    return ([filled[index] for index in order] + empty)[:top_n]


class LangChainReranker:
    """Orders LangChain documents, whose text is ``page_content``."""

    def __init__(self, orderer: AttentionGuidedOrderer, top_n: int | None = None) -> None:
        self.orderer, self.top_n = orderer, top_n

    def compress_documents(self, documents: Sequence[Any], query: str, callbacks: Any = None) -> list[Any]:
        """Return the documents in the order of reading; ``callbacks`` are not called."""
        return reranked(self.orderer, documents, lambda document: document.page_content, query, self.top_n)

    def __call__(self, found: dict[str, Any]) -> list[Any]:
        """Do the same as a step of a chain, for ``{"documents": [...], "query": "..."}``."""
        return self.compress_documents(found["documents"], found["query"])


class LlamaIndexReranker:
    """Orders LlamaIndex nodes with scores, whose text is ``get_content()``."""

    def __init__(self, orderer: AttentionGuidedOrderer, top_n: int | None = None) -> None:
        self.orderer, self.top_n = orderer, top_n

    def postprocess_nodes(
        self, nodes: Sequence[Any], query_bundle: Any = None, query_str: str | None = None
    ) -> list[Any]:
        """Return the nodes in the order of reading; their scores stay those of the retriever."""
        question = query_str or ("" if query_bundle is None else query_bundle.query_str)
        return reranked(self.orderer, nodes, lambda node: node.get_content(), question, self.top_n)


def main(adapter: str, question: str, *files: str) -> None:
    """Print the names of text files in the order of reading."""
    orderer = AttentionGuidedOrderer.from_pretrained(adapter)
    paths = [Path(file) for file in files]
    ordered = reranked(orderer, paths, lambda path: path.read_text(encoding="utf-8"), question)
    print("\n".join(map(str, ordered)))
    print(orderer.settings.trust.describe())


if __name__ == "__main__":
    main(*sys.argv[1:])
