"""The built-in corpus."""

import json

from pre_tokens import builtin_corpus


def test_the_builtin_corpus_is_deterministic_documentation() -> None:
    documents = list(builtin_corpus.documents())
    assert documents == list(builtin_corpus.documents())
    text = "\n".join(documents)
    assert "The with statement is used to wrap the execution of a block" in text.replace("“", "").replace(
        '"', ""
    )
    assert json.dumps.__doc__.strip().splitlines()[0] in text
    assert len(set(documents)) > 3000
    # Mixed well: no document is a large part of a shard, so validation text is like training text.
    assert max(map(len, documents)) < 0.05 * 4 * builtin_corpus.SHARD_SIZE
