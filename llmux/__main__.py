"""``python -m llmux``."""

from llmux.cli import main

if __name__ == "__main__":
    main()
