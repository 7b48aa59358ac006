"""Look for bytes on which two readers differ, led by coverage: ``make fuzz [READER=head] [SECONDS=60]``.

Needs ``atheris`` (``pip install atheris``). What it finds is written to a file ``crash-…`` beside the corpus; the
same bytes belong into ``test_readers.py`` once it is fixed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Fuzz one reader for a while."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=["head", "body", "form", "answer"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder, which grows")
    options = parser.parse_args()
    import atheris  # noqa: PLC0415 - needed here only

    with atheris.instrument_imports(include=["llmux.extract", "llmux.upstream", "llmux.middleware.fast_head"]):
        import readers  # noqa: PLC0415 - imported while it is watched

    corpus = options.corpus / options.reader
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(readers.SEEDS[options.reader]):
        (corpus / f"seed-{number}").write_bytes(seed)
    read = readers.READERS[options.reader]
    arguments = [sys.argv[0], f"-max_total_time={options.seconds}", f"-artifact_prefix={options.corpus}/"]
    atheris.Setup([*arguments, "-max_len=4096", "-rss_limit_mb=1000", str(corpus)], lambda data: read(bytes(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
