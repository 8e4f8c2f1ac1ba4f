"""The reranker callables of ``examples/rerank.py``, on stand-ins for the objects of LangChain and LlamaIndex."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import rerank

from attention_rl_trainer.ordering import AttentionGuidedOrderer


@dataclass
class Document:
    page_content: str
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class NodeWithScore:
    text: str
    score: float

    def get_content(self) -> str:
        return self.text


@dataclass
class QueryBundle:
    query_str: str


def test_documents_come_back_in_the_order_of_reading(orderer: AttentionGuidedOrderer, passages: list[str]) -> None:
    documents = [Document(text, {"source": str(number)}) for number, text in enumerate(passages)]
    documents.insert(2, Document("  "))
    expected = orderer.order(passages, "where is the lake")
    ranked = rerank.LangChainReranker(orderer).compress_documents(documents, "where is the lake")
    assert [document.page_content for document in ranked] == [*expected.texts, "  "]
    assert all(any(document is given for given in documents) for document in ranked)
    best = rerank.LangChainReranker(orderer, top_n=2)({"documents": documents, "query": "where is the lake"})
    assert best == ranked[:2]


def test_nodes_keep_their_scores(orderer: AttentionGuidedOrderer, passages: list[str]) -> None:
    nodes = [NodeWithScore(text, 1 / (number + 1)) for number, text in enumerate(passages)]
    reranker = rerank.LlamaIndexReranker(orderer, top_n=3)
    ranked = reranker.postprocess_nodes(nodes, QueryBundle("where is the lake"))
    assert ranked == [nodes[index] for index in orderer.order(passages, "where is the lake").order[:3]]
    assert reranker.postprocess_nodes(nodes, query_str="where is the lake") == ranked
    alone = orderer.order(passages).order[:3]
    assert reranker.postprocess_nodes(nodes) == [nodes[index] for index in alone]
    assert reranker.postprocess_nodes([NodeWithScore("", 1)]) == [NodeWithScore("", 1)]


@pytest.mark.slow
def test_it_runs_on_files_with_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from attention_rl_trainer.cli import main
    from attention_rl_trainer.models.adapters import add_adapter
    from attention_rl_trainer.models.base import load_base_model

    adapted = add_adapter(load_base_model("offline"), None)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    options = {"tokens_per_query": 8, "tokens_per_key": 12, "attention_layer": 14, "selection_temperature": 0.1}
    (tmp_path / "adapter" / "attention_rl_config.json").write_text(json.dumps(options), encoding="utf-8")
    texts = [
        "The Eiffel Tower is a wrought-iron lattice tower in Paris, named after the engineer Gustave Eiffel.",
        "Mitochondria are organelles found in the cells of most eukaryotes, where they make ATP.",
        "Gustave Eiffel was a French civil engineer who made his name with bridges for the railway.",
    ]
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    names = [str(file) for file in files]
    rerank.main(str(tmp_path / "adapter"), "Who built the Eiffel Tower?", *names)
    printed = capsys.readouterr().out.strip().splitlines()
    assert sorted(printed[:3]) == names
    flags = ["--adapter", str(tmp_path / "adapter"), "--context", "Who built the Eiffel Tower?", "--json"]
    assert main(["order", *names, *flags]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["label"] for step in steps] == printed[:3]
    # Having read about Eiffel makes what follows about him easier to this model, whatever the order.
    about_eiffel = [step for step in steps if "Eiffel" in step["text"]]
    assert about_eiffel[1]["order_gain"] > 0.1
